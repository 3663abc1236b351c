"""The command line."""

from __future__ import annotations

import pytest

from meshproxy import __version__, cli
from meshproxy.version import ENVOY_VERSION


def test_flags_have_envoys_meanings():
    options = cli.parse(
        "-c a.yaml --config-yaml {} --mode validate --concurrency 4 --service-node n --service-cluster c --service-zone z -l debug "
        "--component-log-level upstream:trace --log-path /tmp/x --admin-address-path /tmp/a --base-id 3 --drain-time-s 5 --drain-strategy immediate "
        "--parent-shutdown-time-s 9 --restart-epoch 0 --unsupported warn --disable-hot-restart".split()
    )
    assert (options.config_path, options.config_yaml, options.mode, options.concurrency) == ("a.yaml", "{}", "validate", 4)
    assert (options.service_node, options.service_cluster, options.service_zone) == ("n", "c", "z")
    assert (options.log_level, options.component_log_level, options.log_path) == ("debug", "upstream:trace", "/tmp/x")
    assert (options.drain_time_s, options.drain_strategy, options.parent_shutdown_time_s) == (5, "immediate", 9)
    assert options.unsupported == "warn"
    assert options.disable_hot_restart


def test_defaults_are_envoys():
    options = cli.parse([])
    assert (options.mode, options.drain_time_s, options.drain_strategy, options.parent_shutdown_time_s, options.log_level) == (
        "serve",
        600,
        "gradual",
        900,
        "info",
    )


def test_a_value_may_follow_an_equals_sign_and_arguments_after_two_dashes_are_ignored():
    assert cli.parse(["--config-path=x.yaml", "--", "--nonsense"]).config_path == "x.yaml"


def test_some_flags_may_be_given_again():
    assert cli.parse("--stats-tag team:a --stats-tag zone:b:c".split()).stats_tag == ("team:a", "zone:b:c")


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        ("--concurency 2", "unknown flag --concurency; did you mean --concurrency?"),
        ("--loglevel info", "did you mean --log-level?"),
        ("--qqq", "unknown flag --qqq; see --help"),
        ("envoy.yaml", "'envoy.yaml' is not a flag. A configuration file is given as: -c envoy.yaml"),
        ("-c a -c b", "given twice"),
        ("-c", "missing a value"),
        ("--concurrency x", "not a number"),
        ("--concurrency -1", "not a number"),
        ("--drain-time-s 4294967296", "not a number"),
        ("--mode bogus", "unknown mode 'bogus'; one of serve, validate, init_only"),
        ("--drain-strategy x", "unknown drain-strategy 'x'; one of gradual, immediate"),
        ("--local-address-ip-version v5", "unknown IP address version 'v5'"),
        ("--unsupported maybe", "one of reject, warn"),
        ("--disable-hot-restart=1", "takes no value"),
        ("--stats-tag nocolon", "misformatted stats-tag 'nocolon'"),
        ("--stats-tag te_am:x", "misformatted stats-tag 'te_am:x' contains invalid char in 'te_am'"),
        ("--stats-tag team:a.b", "misformatted stats-tag 'team:a.b' contains invalid char in 'a.b'"),
        ("--stats-tag team:", "misformatted stats-tag 'team:' contains invalid char in ''"),
        ("--disable-extensions envoy.filters.http/envoy.filters.http.fault", "--disable-extensions is not supported: extensions that the configuration"),
        ("--disable-extensions=x", "--disable-extensions is not supported"),
        ("--restart-epoch 1", "no parent to take over from"),
    ],
)
def test_mistakes_are_explained(arguments, why):
    with pytest.raises(cli.UsageError) as error:
        cli.parse(arguments.split())
    assert why in str(error.value)


def test_version_is_a_line_like_envoys():
    line = cli.parse(["--version"])
    name, _, version = line.partition("  version: ")
    revision, number, status, build, tls = version.split("/")
    assert (name, number, status, build, tls) == ("meshproxy", __version__, "Clean", "RELEASE", "OpenSSL")
    assert ENVOY_VERSION in revision


def test_help_names_every_flag_with_its_meaning():
    text = cli.parse(["--help"])
    for flag in cli.FLAGS:
        assert f"--{flag.name}" in text
        assert flag.help.split()[0] in text
    assert max(map(len, text.splitlines())) <= 160


def test_every_flag_is_an_option():
    assert {flag.attribute for flag in cli.FLAGS} == set(cli.Options.__slots__)


def test_main_reports_mistakes_and_fails(capsys):
    with pytest.raises(SystemExit) as exit_:
        cli.main(["--nope"])
    assert exit_.value.code == 1
    assert capsys.readouterr().err.startswith("error: unknown flag --nope")


def test_main_prints_the_version(capsys):
    with pytest.raises(SystemExit) as exit_:
        cli.main(["--version"])
    assert exit_.value.code == 0
    assert capsys.readouterr().out.startswith("meshproxy  version: ")
