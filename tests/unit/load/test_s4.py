"""Stacked S4 and S4D checkpoints against the recurrences that define them, and what is wrong with some of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from stacked_s4 import D_INPUT, D_MODEL, KINDS, checkpoint, hippo_checkpoint, reference
from torch import Tensor
from torch.nn.functional import gelu

from lhcompile.artifacts import LoadedModel
from lhcompile.errors import CheckpointError, ConfigError
from lhcompile.load import load, s4, s4_kernels

TOLERANCE = 1e-4
"""Largest |Δ|, at outputs of about unit scale."""
CONFIGURED = ("prenorm", "disc")


def inputs(time: int = 96) -> Tensor:
    return torch.randn(2, time, D_INPUT, generator=torch.Generator().manual_seed(1))


def loaded(folder: Path, tensors: dict[str, Tensor], context: int | None = None, **options: Any) -> LoadedModel:
    torch.save(tensors, folder / "s4.pt")
    if not options:
        return load(str(folder / "s4.pt"), context=context)
    (folder / "s4.yaml").write_text(yaml.safe_dump(options))
    return load(str(folder / "s4.pt"), config=folder / "s4.yaml", context=context)


def difference(folder: Path, kind: str, **options: Any) -> float:
    """Largest |Δ| between what is loaded and the equations; options: in place of the kind's own."""
    arguments = KINDS[kind]
    tensors = checkpoint(**arguments)
    module = loaded(folder, tensors, **{k: v for k, v in arguments.items() if k in CONFIGURED} | options).module
    return float((module(inputs()) - reference(tensors, inputs(), **arguments)).abs().max())


@pytest.mark.parametrize("kind", KINDS)
def test_the_module_is_its_equations(tmp_path: Path, kind: str) -> None:
    assert difference(tmp_path, kind) <= TOLERANCE


def test_what_loading_says(tmp_path: Path) -> None:
    tensors = checkpoint(**KINDS["dplr"])
    names = {"d_model": D_MODEL, "N": 8, "n_layers": 2, "mode": "nplr", "init": "legs", "dropout": 0.1, "n_ssm": 2}
    found = loaded(tmp_path, {"module." + key: value for key, value in tensors.items()}, **names)
    assert found.family == "s4-dplr"
    assert found.signal.features == D_INPUT
    assert found.context_length is None
    assert found.parameters == sum(value.numel() for key, value in tensors.items() if "l_kernel" not in key)
    assert (found.config["d_state"], found.config["disc"], found.config["prenorm"]) == (8, "bilinear", False)
    assert found.notes == (
        "assumed, as neither file says otherwise: prenorm False, dt_fast False, dt_transform exp, real_transform exp, "
        "imag_transform none, bandlimit None, swap_channels False, activation gelu, mult_act id, l_max None",
        "each position is decoded; the published example averages over time first",
    )


# ---- options of s4.py that change what the same numbers mean -------------------------------------------------------


def storage(tensors: dict[str, Tensor], end: str, change: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
    """The tensors, those whose keys end so changed in double precision."""
    return {key: change(x.double()).float() if key.endswith(end) else x for key, x in tensors.items()}


STORED: dict[str, tuple[dict[str, Any], str, Callable[[Tensor], Tensor]]] = {
    "softplus steps": ({"dt_transform": "softplus"}, "inv_dt", lambda x: x.exp().expm1().log()),
    "sinh of steps": ({"dt_fast": True}, "inv_dt", torch.asinh),
    "plain rates": ({"real_transform": "none"}, "A_real", torch.exp),
    "rates above zero": ({"real_transform": "relu"}, "A_real", lambda x: x.exp() - 1e-4),
    "logarithms of frequencies": ({"imag_transform": "exp"}, "A_imag", torch.log),
    "null activation": ({"mult_act": None}, "none", lambda x: x),
}


@pytest.mark.parametrize("kind", ["diag", "dplr-plain"])
@pytest.mark.parametrize("name", STORED)
def test_the_same_model_stored_otherwise(tmp_path: Path, name: str, kind: str) -> None:
    options, end, change = STORED[name]
    tensors = checkpoint(**KINDS[kind])
    module = loaded(tmp_path, storage(tensors, end, change), layer={"layer": "fftconv", **options}).module
    assert float((module(inputs()) - reference(tensors, inputs(), **KINDS[kind])).abs().max()) <= TOLERANCE


def test_copies_that_lie_innermost(tmp_path: Path) -> None:
    tensors = checkpoint(**KINDS["diag"])
    copies = KINDS["diag"]["channels"]
    swapped = storage(tensors, "output_linear.0.weight", lambda w: w.unflatten(1, (copies, -1)).mT.flatten(1))
    module = loaded(tmp_path, swapped, swap_channels=True).module
    assert float((module(inputs()) - reference(tensors, inputs(), layer="diag")).abs().max()) <= TOLERANCE


def test_real_systems_are_complex_ones_that_do_not_turn(tmp_path: Path) -> None:
    tensors = storage(checkpoint(**KINDS["diag-bilinear"]), "A_imag", torch.zeros_like)
    for end in (".B", ".C"):
        tensors = storage(tensors, end, lambda x: x * torch.tensor([1.0, 0.0]))
    real = {key: x[..., 0].clone() if key.endswith((".B", ".C")) else x for key, x in tensors.items()}
    real = {key: x for key, x in real.items() if not key.endswith("A_imag")}
    found = loaded(tmp_path, real, is_real=True, d_state=4, disc="bilinear")
    assert found.config["is_real"]
    expected = reference(tensors, inputs(), layer="diag", disc="bilinear")
    assert float((found.module(inputs()) - expected).abs().max()) <= TOLERANCE


def test_activations_are_those_of_the_options(tmp_path: Path) -> None:
    tensors = checkpoint(**KINDS["diag"])
    one = loaded(tmp_path, tensors, activation="silu", mult_act="tanh").module
    block = one.s4_layers[0]
    u = torch.randn(1, 5, D_MODEL, generator=torch.Generator().manual_seed(2))
    inner = block.layer
    raw = s4.real_form(u.repeat(1, 1, 2), inner.own, inner.other, inner.readout, inner.D.flatten())
    expected = torch.nn.functional.glu(block.output_linear(torch.tanh(torch.nn.functional.silu(raw))))
    torch.testing.assert_close(block(u), expected)


@pytest.mark.parametrize("final_act", ["id", "gelu", None])
def test_other_ends_of_a_layer(tmp_path: Path, final_act: str | None) -> None:
    """Without a GLU the linear map has half the rows; without a final activation there is none."""
    tensors = checkpoint(**KINDS["diag-bilinear"])
    halves = {k: x[:D_MODEL] if "output_linear" in k else x for k, x in tensors.items()}
    kept = {k: x for k, x in halves.items() if final_act or "output_linear" not in k}
    block = loaded(tmp_path, kept, disc="bilinear", final_act=final_act).module.s4_layers[0]
    u = torch.randn(1, 5, D_MODEL, generator=torch.Generator().manual_seed(2))
    y = block.layer(u)
    if final_act:
        y = y @ halves["s4_layers.0.output_linear.0.weight"].T + halves["s4_layers.0.output_linear.0.bias"]
    torch.testing.assert_close(block(u), gelu(y) if final_act == "gelu" else y)


def test_the_longest_kernel_bounds_the_context(tmp_path: Path) -> None:
    found = loaded(tmp_path, checkpoint(**KINDS["diag"]), l_max=128)
    assert found.context_length == 128
    assert "past l_max 128 the recurrence goes on, where the original cuts its kernel" in found.notes
    with pytest.raises(ConfigError, match="context 129 is not between 2 and the checkpoint's l_max 128"):
        loaded(tmp_path, checkpoint(**KINDS["diag"]), context=129, l_max=128)


def test_nodes_that_a_kernel_cached_are_left_alone(tmp_path: Path) -> None:
    tensors = checkpoint(**KINDS["dplr"])
    cached = {f"s4_layers.0.layer.kernel.{name}": torch.ones(5, dtype=torch.complex64) for name in ("omega", "z")}
    found = loaded(tmp_path, tensors | cached)
    assert float((found.module(inputs()) - reference(tensors, inputs(), layer="dplr")).abs().max()) <= TOLERANCE


@pytest.mark.parametrize("kind", ["s4d", "diag-prenorm", "dplr"])
def test_the_sequence_model_of_lightning(tmp_path: Path, kind: str) -> None:
    """Its keys are others; a prenorm model has one norm more, before the decoder."""
    arguments, options = KINDS[kind], {"residual": "R", "norm": "layer", "dropout": 0.1, "pool": None}
    tensors = checkpoint(**arguments)
    wide = tensors | {"decoder.weight": torch.eye(D_MODEL), "decoder.bias": torch.zeros(D_MODEL)}
    hidden = reference(wide, inputs(), **arguments)
    names = {"s4_layers.": "model.layers.", "norms.": "model.layers."}
    names |= {"encoder.": "encoder.1.", "decoder.": "decoder.0."}
    state = {}
    for key, value in tensors.items():
        old = next(name for name in names if key.startswith(name))
        rest = key.removeprefix(old)
        middle = {"s4_layers.": ".layer.", "norms.": ".norm.norm.", "decoder.": "output_transform."}.get(old, "")
        number, _, part = rest.partition(".") if "." in middle[:1] else ("", "", rest)
        state[f"{names[old]}{number}{middle}{part}"] = value
    if arguments.get("prenorm"):
        gain, shift = torch.linspace(0.5, 2, D_MODEL), torch.linspace(-1, 1, D_MODEL)
        state |= {"model.norm.norm.weight": gain, "model.norm.norm.bias": shift}
        hidden = torch.nn.functional.layer_norm(hidden, [D_MODEL], gain.double(), shift.double())
    torch.save({"state_dict": state, "epoch": 1}, tmp_path / "last.ckpt")
    (tmp_path / "run.yaml").write_text(yaml.safe_dump({"model": options | {"prenorm": "prenorm" in arguments}}))
    found = load(str(tmp_path / "last.ckpt"), config=tmp_path / "run.yaml")
    expected = hidden @ tensors["decoder.weight"].T.double() + tensors["decoder.bias"].double()
    assert float((found.module(inputs()) - expected).abs().max()) <= TOLERANCE


def test_two_sided_kernels_are_refused(tmp_path: Path) -> None:
    tensors = checkpoint(**KINDS["diag-bilinear"])
    key = "s4_layers.0.layer.kernel.C"
    with pytest.raises(CheckpointError, match=f"{key!r} holds two kernels for each in .*: a bidirectional layer"):
        loaded(tmp_path, tensors | {key: tensors[key].repeat(2, 1, 1, 1)})


# ---- every trap moves the outputs ----------------------------------------------------------------------------------


def _flipped(self: Any) -> Tensor:
    return torch.complex(-self.A_real.double().exp(), self.A_imag.double())


def _halved(make: Callable[..., Any]) -> Callable[..., Any]:
    def modes(*arguments: Tensor) -> tuple[Tensor, Tensor]:
        poles, residues = make(*arguments)
        return poles, residues / 2

    return modes


def _s4d_flipped(self: Any, direct: Tensor) -> Any:
    self.A_imag.neg_()
    return _S4D(self, direct)


def _unprepared(self: Any) -> Any:
    self.l_kernel.zero_()
    return _SYSTEM(self)


_SYSTEM, _S4D = s4.DPLRKernel.system, s4.S4DKernel.modal
MUTANTS: dict[str, tuple[str, Any, str, Any]] = {  # name → kind, owner, attribute, replacement
    "s4d: sign of A_imag": ("s4d", s4.S4DKernel, "modal", _s4d_flipped),
    "diag: sign of A_imag": ("diag", s4.DiagKernel, "rates", property(_flipped)),
    "dplr: sign of A_imag": ("dplr", s4.DiagKernel, "rates", property(_flipped)),
    "s4d: factor 2": ("s4d", s4, "zoh_modes", _halved(s4_kernels.zoh_modes)),
    "diag: factor 2": ("diag", s4, "zoh_modes", _halved(s4_kernels.zoh_modes)),
    "s4d: bilinear": ("s4d", s4, "zoh_modes", s4_kernels.bilinear_modes),
    "diag: bilinear": ("diag", s4, "zoh_modes", s4_kernels.bilinear_modes),
    "diag: zoh": ("diag-bilinear", s4, "bilinear_modes", s4_kernels.zoh_modes),
    "dplr: l_kernel ignored": ("dplr", s4.DPLRKernel, "system", _unprepared),
    "dplr: no low rank": ("dplr", s4.DPLRKernel, "modal", s4.DiagKernel.modal),
    "diag: systems in blocks": ("diag", s4, "systems_of", lambda h, n: torch.arange(h) // (h // n)),
    "dplr: systems in blocks": ("dplr", s4_kernels, "systems_of", lambda h, n: torch.arange(h) // (h // n)),
    "s4d: tanh GELU": ("s4d", s4, "gelu", lambda x: gelu(x, approximate="tanh")),
    "dplr: tanh GELU": ("dplr", s4, "gelu", lambda x: gelu(x, approximate="tanh")),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_a_wrong_reading_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    kind, owner, attribute, replacement = MUTANTS[name]
    monkeypatch.setattr(owner, attribute, replacement)
    assert difference(tmp_path, kind) > 2 * TOLERANCE


@pytest.mark.parametrize(
    ("kind", "options"),
    [("s4d", {"prenorm": True}), ("diag-prenorm", {"prenorm": False}), ("diag-bilinear", {"disc": "zoh"})],
)
def test_a_wrong_option_is_seen(tmp_path: Path, kind: str, options: dict[str, Any]) -> None:
    assert difference(tmp_path, kind, **options) > 2 * TOLERANCE


# ---- modes that cancel ---------------------------------------------------------------------------------------------


def test_parallel_eigenvectors_keep_their_taps(tmp_path: Path) -> None:
    tensors = hippo_checkpoint()
    found = loaded(tmp_path, tensors, context=96)
    assert found.notes[-1] == "kept as 96 taps, for their modes cancel: s4_layers.0.layer, s4_layers.1.layer"
    assert found.context_length == 96
    expected = reference(tensors, inputs(), layer="dplr")
    assert float((found.module(inputs()) - expected).abs().max()) <= TOLERANCE
    with pytest.raises(ValueError, match="a sequence of 97 is longer than the 96 taps"):
        found.module(inputs(97))


def test_taps_and_modes_are_one_kernel() -> None:
    draw = torch.Generator().manual_seed(0)
    real = {"dtype": torch.float64, "generator": draw}
    rates = torch.complex(-torch.rand(2, 3, **real) - 0.2, torch.randn(2, 3, **real))
    p, b = (torch.randn(*shape, dtype=torch.complex128, generator=draw) for shape in ((1, 2, 3), (2, 3)))
    c, dt = torch.randn(2, 4, 3, dtype=torch.complex128, generator=draw), 0.1 + torch.rand(4, **real)
    for prepared in (0, 7):
        system = s4_kernels.DPLR.of(rates, p, b, c, dt, prepared)
        modal = system.modal(torch.zeros(8))
        assert modal is not None
        assert modal.poles.shape == (8, 6)
        torch.testing.assert_close(system.taps(50), modal.taps(50), rtol=1e-9, atol=1e-9)
        near, error = s4_kernels.rounded(modal, 50)
        assert torch.equal(near.poles, modal.poles.to(torch.complex64).to(torch.complex128))
        found = (near.taps(50) - modal.taps(50)).norm(dim=1) / modal.taps(50).norm(dim=1)
        assert float(found.max()) < error < 1e-6


def test_residues_follow_poles_that_are_rounded() -> None:
    """HiPPO-LegS moved by 5 %: residues are large and cancel."""
    draw = torch.Generator().manual_seed(2)
    kernel = s4.DPLRKernel(s4.S4Config("dplr", D_INPUT, D_MODEL, 1, 1, d_state=64, n_ssm=1))
    prefix = "s4_layers.0.layer.kernel."
    tensors = {k.removeprefix(prefix): v for k, v in hippo_checkpoint(half=32).items() if k.startswith(prefix)}
    for name in ("A_real", "A_imag", "P", "B"):
        tensors[name] = tensors[name] * (1 + 0.05 * torch.randn(tensors[name].shape, generator=draw))
    tensors["inv_dt"] = torch.linspace(-7, -2, D_MODEL)[:, None]
    kernel.load_state_dict(tensors)
    with torch.no_grad():
        system = kernel.modal(torch.zeros(D_MODEL))
        assert system is not None
        near, error = s4_kernels.rounded(system, 1000)
        exact = kernel.system().taps(1000)
    poles = system.poles.to(torch.complex64).to(torch.complex128)
    kept, moved = (
        float(((each.taps(1000) - exact).norm(dim=1) / exact.norm(dim=1)).max())
        for each in (replace(system, poles=poles), near)
    )
    assert kept > 2e-5
    assert moved <= error < kept / 10


# ---- what is wrong with a checkpoint -------------------------------------------------------------------------------


def test_faults_of_the_checkpoint(tmp_path: Path) -> None:
    tensors = checkpoint(**KINDS["dplr"])
    kernel = "s4_layers.0.layer.kernel."
    looked = "; it looked like a stacked S4 model of dplr layers"
    cases: list[tuple[dict[str, Any], str]] = [
        ({kernel + "A_real": None}, rf"missing key '{kernel}A_real' of shape \[n_ssm, d_state / 2\]{looked}"),
        ({kernel + "B": None}, rf"missing key '{kernel}B' of shape \[1, 2, 4, 2\]{looked}"),
        ({kernel + "B": torch.ones(1, 2, 5, 2)}, rf"'{kernel}B' has shape \[1, 2, 5, 2\], expected \[1, 2, 4, 2\]"),
        ({kernel + "inv_dt": torch.ones(D_MODEL, 3)}, r"has shape \[6, 3\], expected \[6, 4\]"),
        ({kernel + "A_real": torch.ones(4, 4)}, "holds 4 systems, which 6 channels cannot share"),
        ({"decoder.weight": torch.ones(4)}, r"'decoder.weight' has shape \[4\], expected \[d_output, d_model\]"),
        ({"extra": torch.ones(1)}, "unexpected key 'extra'"),
        (
            {kernel + "A_real": torch.full((2, 4), -30.0), kernel + "P": torch.zeros(1, 2, 4, 2)},
            r"'s4_layers.0.layer.kernel': channel \d has a pole of modulus 1\S*, not below 1: its memory would never",
        ),
    ]
    for changes, message in cases:
        changed = {key: value for key, value in {**tensors, **changes}.items() if value is not None}
        with pytest.raises(CheckpointError, match=message):
            loaded(tmp_path, changed)
    gap = {key.replace("s4_layers.1", "s4_layers.2"): value for key, value in tensors.items()}
    with pytest.raises(CheckpointError, match=r"the layers are numbered \[0, 2\], with gaps"):
        loaded(tmp_path, gap)


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        ("s4d", {"layer": "dplr"}, "the option layer is dplr, but .* in the checkpoint makes it s4d"),
        ("diag", {"mode": "nplr"}, "the option mode = 'nplr' is not supported"),
        ("diag", {"disc": "dss"}, "the option disc is 'dss', not one of zoh, bilinear"),
        ("dplr", {"disc": "zoh"}, "the option disc is zoh, but .* in the checkpoint makes it bilinear"),
        ("dplr", {"d_state": 64}, "the option d_state is 64, but .*A_real' in the checkpoint makes it 8"),
        ("dplr", {"bidirectional": True}, "the option bidirectional = True is not supported"),
        ("s4d", {"prenom": True}, "unknown option 'prenom'"),
    ],
)
def test_faults_of_the_configuration(tmp_path: Path, kind: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=rf"s4\.yaml: {message}"):
        loaded(tmp_path, checkpoint(**KINDS[kind]), **options)
