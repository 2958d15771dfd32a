"""Options and environment variables: what they take, and one clear error for what they do not."""

from __future__ import annotations

from typing import Any

import pytest

from qsdpa_patch.adapter import Adapter
from qsdpa_patch.adapter_registry import register_adapter
from qsdpa_patch.kernels.format import Format
from qsdpa_patch.settings import Settings, installed_model_types, resolve_settings


def test_defaults() -> None:
    assert resolve_settings(environment={}) == Settings()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"key_bits": 7}, r"key_bits=7 .* 2, 3, 4, 5, 6, 8, or a format: 'mxfp4', 'mxfp8', 'nvfp4'"),
        ({"value_bits": "mxfp5"}, "value_bits='mxfp5'"),
        ({"key_bits": True}, "key_bits=True"),
        ({"kernels": "opencl"}, "kernels='opencl' is unknown: use one of 'auto', 'metal', 'cuda', 'cpu', 'ops'"),
        ({"models": ["lama"]}, "'lama' is no model type of the installed mlx-lm: did you mean .*'llama'"),
        ({"models": []}, "would cover nothing"),
        ({"strict": True, "kernels": "ops"}, "strict=True refuses every call"),
        ({"rotate": "queries"}, "rotate='queries' is unknown: use one of False, True, 'keys', 'values'"),
        ({"rotate": 1}, "rotate=1 is unknown"),
    ],
)
def test_bad_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        resolve_settings(**options, environment={})


def test_bad_types() -> None:
    with pytest.raises(TypeError, match=r"give a list of model types, \['llama'\]"):
        resolve_settings(models="llama", environment={})
    with pytest.raises(TypeError, match="strict='yes'"):
        resolve_settings(strict="yes", environment={})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("variable", "text", "option", "value"),
    [
        ("QSDPA_KEY_BITS", "8", "key_bits", 8),
        ("QSDPA_VALUE_BITS", "mxfp4", "value_bits", "mxfp4"),
        ("QSDPA_KERNELS", "CPU", "kernels", "cpu"),
        ("QSDPA_STRICT", "on", "strict", True),
        ("QSDPA_STRICT", "0", "strict", False),
        ("QSDPA_ROTATE", "1", "rotate", True),
        ("QSDPA_ROTATE", "off", "rotate", False),
        ("QSDPA_ROTATE", "Keys", "rotate", "keys"),
    ],
)
def test_environment(variable: str, text: str, option: str, value: object) -> None:
    assert getattr(resolve_settings(environment={variable: text}), option) == value


@pytest.mark.parametrize(
    ("variable", "text"),
    [
        ("QSDPA_KEY_BITS", "7"),
        ("QSDPA_VALUE_BITS", "four"),
        ("QSDPA_KERNELS", "x"),
        ("QSDPA_STRICT", "maybe"),
        ("QSDPA_ROTATE", "both"),
    ],
)
def test_a_bad_environment_value_is_named(variable: str, text: str) -> None:
    with pytest.raises(ValueError, match=f"{variable}='?{text}'?"):
        resolve_settings(environment={variable: text})


def test_an_option_takes_precedence_over_its_variable() -> None:
    settings = resolve_settings(key_bits=4, environment={"QSDPA_KEY_BITS": "8"})
    assert settings.key_bits == 4


def test_formats_follow_mlx_lm_unless_told_otherwise() -> None:
    assert Settings().formats(4, 32) == (Format.affine(4, 32), Format.affine(4, 32))
    assert Settings(key_bits=8).formats(4, 64) == (Format.affine(8, 64), Format.affine(4, 64))
    assert Settings(value_bits="nvfp4").formats(4, 64) == (Format.affine(4, 64), Format.named("nvfp4"))


@pytest.mark.parametrize(
    ("rotate", "rotated"),
    [(False, (False, False)), (True, (True, True)), ("keys", (True, False)), ("values", (False, True))],
)
def test_rotation_is_chosen_by_side(rotate: bool | str, rotated: tuple[bool, bool]) -> None:
    formats = Settings(value_bits="mxfp4", rotate=rotate).formats(4, 64)
    assert tuple(format.rotated for format in formats) == rotated
    assert tuple(format.packing for format in formats) == (Format.affine(4, 64), Format.named("mxfp4"))


def test_mlx_lms_bits_are_checked() -> None:
    with pytest.raises(ValueError, match="bits=7 is not supported"):
        Settings().formats(7, 64)


def test_model_types_of_adapters_are_known() -> None:
    register_adapter(Adapter(name="mine", model_types=("my_model",)))
    assert resolve_settings(models=["my_model", "llama"], environment={}).covers("my_model")
    assert {"llama", "gemma3_text", "deepseek_v3"} <= installed_model_types()
