"""Budgets: what a request and a connection may cost, in counts that repeat (instructions, bytes, garbage), never in times.

The ceilings stand at the top of each file, some 15 % above what was measured when they were set. Who makes something cheaper lowers the ceiling.
"""
