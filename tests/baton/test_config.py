"""Configuration: which source wins, and a refusal that names the option to change."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from baton.config import Config, is_loopback, join_address, load_config, option_names, split_address
from baton.errors import ConfigError

TOKEN = "a-secret-of-some-length"


def write(folder: Path, text: str) -> str:
    file = folder / "baton.yaml"
    file.write_text(text)
    return str(file)


@pytest.mark.parametrize(
    ("sources", "wanted"),
    [
        ("flag env yaml", 11),
        ("flag yaml", 11),
        ("env yaml", 22),
        ("yaml", 33),
        ("flag env", 11),
        ("env", 22),
        ("", Config.model_fields["threads"].default),
    ],
)
def test_flag_wins_over_environment_over_file_over_default(
    tmp_path: Path, sources: str, wanted: int
) -> None:
    flags = {"threads": "11"} if "flag" in sources else {}
    environ = {"BATON_THREADS": "22"} if "env" in sources else {}
    file = write(tmp_path, "threads: 33") if "yaml" in sources else None
    assert load_config("prefill", flags, environ, file).threads == wanted


def test_the_environment_of_another_kind_of_node_is_not_read() -> None:
    assert load_config("router", {}, {"BATON_THREADS": "nonsense"}) == Config()


def test_one_file_may_serve_every_kind_of_node(tmp_path: Path) -> None:
    file = write(tmp_path, "max_requests: 5\nmax_running: 6\nstep_tokens: 7")
    for kind in ("router", "prefill", "decode"):
        config = load_config(kind, {}, {}, file)
        assert (config.max_requests, config.max_running, config.step_tokens) == (5, 6, 7)


def test_an_empty_file_says_nothing(tmp_path: Path) -> None:
    assert load_config("decode", {}, {}, write(tmp_path, "# nothing yet")) == Config()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"listen": "nonsense"}, "^listen: 'nonsense' is not HOST:PORT"),
        ({"listen": "127.0.0.1:65536"}, "^listen: '127.0.0.1:65536' is not HOST:PORT"),
        ({"router": "127.0.0.1:-1"}, "^router: '127.0.0.1:-1' is not HOST:PORT"),
        ({"router": ":7000"}, "^router: ':7000' is not HOST:PORT"),
        ({"listen": "0.0.0.0:0"}, "^listen is 0.0.0.0, .*--token-file"),
        ({"listen": "[::]:0"}, "^listen is ::, .*--token-file"),
        ({"http": "example.org:80"}, "^http is example.org, .*--token-file"),
        ({"heartbeat_s": 5.0, "lease_s": 5.0}, "^heartbeat_s must be less than lease_s"),
        ({"dtype": "float16"}, "^dtype: .*'float32' or 'bfloat16'"),
        ({"threads": 0}, "^threads: .*greater than or equal to 1"),
        ({"kv_memory_mib": "much"}, "^kv_memory_mib: .*valid integer"),
        ({"lease_s": 0}, "^lease_s: .*greater than 0"),
        ({"max_message_bytes": 1}, "^max_message_bytes: "),
        ({"log_level": "loud"}, "^log_level: "),
        ({"threads": 0, "block_size": 0}, "threads: .*; block_size: "),
    ],
    ids=str,
)
def test_a_value_that_cannot_be_is_refused_by_name(flags: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config("router", flags, {})


@pytest.mark.parametrize("name", ["heartbeat_s", "lease_s", "link_timeout_s", "drain_timeout_s"])
@pytest.mark.parametrize("value", ["nan", "-1"])
def test_a_time_that_is_no_time_is_refused(name: str, value: str) -> None:
    with pytest.raises(ConfigError):
        load_config("router", {name: value}, {})


def test_an_unknown_key_in_a_file_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"^treads is no option; .*--help"):
        load_config("prefill", {}, {}, write(tmp_path, "treads: 2"))


@pytest.mark.parametrize("text", ["- a\n- list", "just words", "1: one", "a: [unclosed", "!!x y"])
def test_a_file_that_holds_no_options_is_named(tmp_path: Path, text: str) -> None:
    with pytest.raises(ConfigError, match=r"baton\.yaml"):
        load_config("prefill", {}, {}, write(tmp_path, text))


def test_a_file_that_is_no_text_is_named(tmp_path: Path) -> None:
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match=r"binary\.yaml cannot be read"):
        load_config("prefill", {}, {}, str(tmp_path / "binary.yaml"))


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none\.yaml cannot be read"):
        load_config("prefill", {}, {}, str(tmp_path / "none.yaml"))


def test_a_token_lets_a_node_listen_off_loopback(tmp_path: Path) -> None:
    (tmp_path / "token").write_text(f"{TOKEN}\n")
    config = Config(listen="0.0.0.0:0", token_file=str(tmp_path / "token"))
    assert config.token() == TOKEN


def test_no_token_file_means_no_token() -> None:
    assert Config().token() is None


def test_a_short_token_is_refused(tmp_path: Path) -> None:
    (tmp_path / "token").write_text(" " * 20 + "short")
    with pytest.raises(ConfigError, match=r"^token_file .*16 characters"):
        Config(token_file=str(tmp_path / "token")).token()


@pytest.mark.parametrize(
    "content", [TOKEN.encode() + b"\xff", f"{TOKEN}ü".encode(), f"{TOKEN}\nmore".encode()]
)
def test_a_token_that_metadata_cannot_carry_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "token").write_bytes(content)
    with pytest.raises(ConfigError, match=r"^token_file "):
        Config(token_file=str(tmp_path / "token")).token()


def test_a_token_file_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"^token_file cannot be read"):
        Config(token_file=str(tmp_path / "none")).token()


def test_every_option_has_a_reader_and_a_description() -> None:
    read = {name for kind in ("router", "prefill", "decode") for name in option_names(kind)}
    assert read == set(Config.model_fields)
    assert all(field.description for field in Config.model_fields.values())


@given(
    host=st.one_of(
        st.ip_addresses().map(str), st.from_regex(r"[a-z]([a-z0-9.-]*[a-z0-9])?", fullmatch=True)
    ),
    port=st.integers(0, 65535),
)
def test_an_address_comes_back_from_its_parts(host: str, port: int) -> None:
    assert split_address(join_address(host, port)) == (host, port)


@pytest.mark.parametrize("address", ["", ":", "host", "host:", "host:port", "host:70000", "h:+1"])
def test_what_is_no_address_is_refused(address: str) -> None:
    with pytest.raises(ValueError, match="is not HOST:PORT"):
        split_address(address)


@pytest.mark.parametrize(
    ("host", "wanted"),
    [
        ("localhost", True),
        ("127.0.0.1", True),
        ("127.9.9.9", True),
        ("::1", True),
        ("0.0.0.0", False),
        ("::", False),
        ("10.0.0.1", False),
        ("myhost", False),
        ("localhost.example.org", False),
    ],
)
def test_loopback_is_what_only_this_machine_reaches(host: str, wanted: bool) -> None:
    assert is_loopback(host) is wanted
