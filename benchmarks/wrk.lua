-- The request is a template in a file, in which $n is a counter as 12 hexadecimal digits, and $r goes through all numbers below a limit in leaps.
-- Arguments: the file, the counter's start, the limit, the format of $r. The outcome is printed as one line of JSON.
local parts, fixed, counter, leaping, limit, digits = {}, nil, 0, 0, 1, "%d"
local LEAP = 7919 -- as in sender.py

function init(args)
    local file = assert(io.open(args[1], "rb"))
    local text = file:read("*a")
    file:close()
    counter, limit = tonumber(args[2]), tonumber(args[3])
    digits = args[4]
    if not text:find("%$[nr]") then
        fixed = text
        return
    end
    local at = 1
    while true do
        local found = text:find("%$[nr]", at)
        parts[#parts + 1] = text:sub(at, (found or 0) - 1)
        if not found then break end
        parts[#parts + 1] = text:sub(found, found + 1)
        at = found + 2
    end
end

function request()
    if fixed then return fixed end
    counter, leaping = counter + 1, (leaping + LEAP) % limit
    local n, r = string.format("%012x", counter), string.format(digits, leaping)
    local made = {}
    for index, part in ipairs(parts) do
        made[index] = part == "$n" and n or part == "$r" and r or part
    end
    return table.concat(made)
end

function done(summary, latency, requests)
    local errors = summary.errors
    io.write(string.format(
        'RESULT {"requests": %d, "seconds": %f, "p50_us": %f, "p99_us": %f, "errors": {"connect": %d, "read": %d, "write": %d, "timeout": %d, "status": %d}}\n',
        summary.requests, summary.duration / 1e6, latency:percentile(50), latency:percentile(99),
        errors.connect, errors.read, errors.write, errors.timeout, errors.status))
end
