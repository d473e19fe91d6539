"""Options: every bad one raises and names the nearest valid one."""

import pytest

from braze.options import DOCUMENTED, Options


def test_defaults() -> None:
    assert Options.parse(None) == Options()


def test_own_and_inductors_options_are_told_apart() -> None:
    parsed = Options.parse({"require": ["rope", "moe"], "kernel": {"moe": "aten"}, "max-autotune": True})
    assert parsed.require == ("rope", "moe")
    assert parsed.kernel == {"moe": "aten"}
    assert parsed.inductor == {"max_autotune": True}


def test_mode_becomes_inductors_settings() -> None:
    assert Options.parse(None, "reduce-overhead").inductor["triton.cudagraphs"] is True


@pytest.mark.parametrize(
    ("options", "mode", "message"),
    [
        ({"requre": ["moe"]}, None, "did you mean 'require'"),
        ({"max_autotunee": True}, None, "did you mean 'max_autotune'"),
        ({"require": ["mow"]}, None, "did you mean 'moe'"),
        ({"require": 3}, None, "takes a list of kinds"),
        ({"strict": "yes"}, None, "takes True or False"),
        ({"kernel": {"moe": "cp"}}, None, "did you mean 'cpp'"),
        ({"kernel": {"mo": "cpp"}}, None, "did you mean 'moe'"),
        ({"kernel": "cpp"}, None, "takes a dict"),
        ({"max_autotune": "yes"}, None, "takes bool"),
        ({"require": ["moe"], "disable": ["moe"]}, None, "both name moe"),
        (None, "reduce_overhead", "did you mean 'reduce-overhead'"),
    ],
)
def test_a_bad_option_names_the_nearest(options: dict[str, object] | None, mode: str | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Options.parse(options, mode)


def test_key_covers_what_changes_code() -> None:
    keys = {
        Options.parse(o).key()
        for o in (None, {"disable": ["moe"]}, {"require": ["moe"]}, {"strict": True}, {"kernel": {"moe": "aten"}})
    }
    assert len(keys) == 5
    assert Options.parse({}).key() == Options.parse(None).key()


def test_every_option_is_documented() -> None:
    assert set(DOCUMENTED) == set(Options.__dataclass_fields__) - {"inductor"}
