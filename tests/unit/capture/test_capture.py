"""Two exports of fixed size become one program of its sizes."""

from __future__ import annotations

import re
import warnings

import pytest
import torch
import torch.nn.functional as F
from models import CONTEXT, VOCAB, WIDTH, HeadsInnermost, HeadsOutermost, Hyena, Mixed, Mixer, tiny
from streams import assert_close
from torch import Tensor, nn
from torch.fx import Node

from lhcompile.artifacts import LoadedModel, Program
from lhcompile.capture import capture
from lhcompile.errors import CaptureError
from lhcompile.sizes import BATCH, TIME, Size


def refusal(loaded: LoadedModel) -> str:
    with pytest.raises(CaptureError) as caught:
        capture(loaded)
    assert caught.value.exit_code == 2
    assert "\n" not in str(caught.value)
    return str(caught.value)


def nodes(program: Program, name: str) -> list[Node]:
    return [node for node in program.graph.graph.nodes if str(node.target).startswith(name)]


def laws(node: Node) -> list[str]:
    return [str(size) for size in node.meta["sizes"]]


class Both(Mixer):
    """The two operators of the listing in the stage's text."""

    def forward(self, x: Tensor) -> Tensor:
        time = x.shape[1]
        u = self.short(x.transpose(1, 2))[..., :time][:, :WIDTH]
        spectrum = torch.fft.rfft(u, n=2 * time) * torch.fft.rfft(self.taps[:, :time], n=2 * time)
        return torch.fft.irfft(spectrum, n=2 * time)[..., :time].transpose(1, 2)


def test_numbers_become_expressions_of_the_sizes() -> None:
    """
    before (at 7 × 1023)                         after
    slice(conv1d, 2, 0, 1023)                    slice(conv1d, 2, 0, t)      t = sym_size(input_ids, 1)
    fft_rfft(u, 2046)                            fft_rfft(u, mul(t, 2))
    """
    program = capture(tiny(Both))
    code = re.sub(r";  \w+ = .*", "", program.graph.code)
    time = r"sym_size_int = torch.ops.aten.sym_size.int\(\w+, 1\)"
    assert re.search(time, code)
    assert re.search(r"slice_1 = torch.ops.aten.slice.Tensor\(conv1d, 2, 0, sym_size_int\)", code)
    assert re.search(r"mul(_\d)? = sym_size_int \* 2", code)
    assert re.search(r"fft_rfft = torch.ops.aten.fft_rfft.default\(slice_2, mul(_\d)?\)", code)
    assert str(CONTEXT - 1) not in code


def test_every_axis_is_known_in_terms_of_batch_and_time() -> None:
    program = capture(tiny(Both))
    assert [laws(node) for node in nodes(program, "aten.conv1d")] == [["B", "24", "T+2"]]
    signal, taps = nodes(program, "aten.fft_rfft")
    assert laws(signal)[:2] == ["B", "8"]
    assert laws(taps)[:1] == ["8"]
    assert [laws(node) for node in nodes(program, "aten.fft_irfft")] == [["B", "8", "2·T"]]
    (output,) = nodes(program, "output")
    assert output.args[0][0].meta["sizes"] == (BATCH, TIME, Size(0, 0, VOCAB))


@pytest.mark.parametrize("mixer", [Hyena, HeadsInnermost, HeadsOutermost, Mixed], ids=lambda mixer: mixer.__name__)
def test_runs_at_any_batch_and_length(mixer: type[Mixer]) -> None:
    loaded = tiny(mixer, mixer)
    program = capture(loaded)
    assert program.context == CONTEXT
    assert program.states == ()
    for batch, time in [(1, 1), (2, CONTEXT), (5, 7), (1, CONTEXT - 4), (7, CONTEXT - 1), (11, 2)]:
        tokens = torch.randint(0, VOCAB, (batch, time), generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            assert_close(program.graph(tokens), loaded.module(tokens), f"{batch} × {time}")


@pytest.mark.parametrize("context", [8, 9, 13, 1024, 1025])
def test_any_context(context: int) -> None:
    class Anywhere(Mixer):
        def forward(self, x: Tensor) -> Tensor:
            time = x.shape[1]
            taps = torch.exp(-torch.arange(time) / 9.0)
            u = self.short(x.transpose(1, 2))[..., :time][:, :WIDTH]
            y = torch.fft.irfft(torch.fft.rfft(u, n=2 * time) * torch.fft.rfft(taps, n=2 * time), n=2 * time)
            return y[..., :time].transpose(1, 2)

    loaded = tiny(Anywhere, context=context)
    tokens = torch.randint(0, VOCAB, (2, context), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert_close(capture(loaded).graph(tokens), loaded.module(tokens), "logits")


def test_what_only_training_needs_is_gone() -> None:
    class Resting(Mixer):
        def forward(self, x: Tensor) -> Tensor:
            u = F.dropout(x[..., :WIDTH].float().contiguous(), 0.1, self.training).clone().detach()
            torch._check(x.shape[1] <= CONTEXT)
            return nn.AlphaDropout(0.2).eval()(u)

    program = capture(tiny(Resting))
    ours = [node for node in program.graph.graph.nodes if "layers.0.mixer" in str(node.meta.get("nn_module_stack"))]
    assert [str(node.target) for node in ours] == ["aten.slice.Tensor"]


def test_nothing_is_changed_in_place_and_the_module_stays_as_it_was() -> None:
    class InPlace(Mixer):
        def forward(self, x: Tensor) -> Tensor:
            y = self.short(x.transpose(1, 2))[:, :WIDTH, : x.shape[1]]
            y += 1
            y[:, 0] = 0
            return y.transpose(1, 2).tanh_()

    loaded = tiny(InPlace)
    before = {name: value.clone() for name, value in loaded.module.state_dict().items()}
    program = capture(loaded)
    assert not [node for node in program.graph.graph.nodes if re.search(r"_\.|slice_scatter", str(node.target))]
    assert all(torch.equal(before[name], value) for name, value in loaded.module.state_dict().items())


# ---- programs that are not one program of their sizes --------------------------------------------------------------


class OtherOperators(Mixer):
    def forward(self, x: Tensor) -> Tensor:
        return x[..., :WIDTH].cos() if x.shape[1] % 2 else x[..., :WIDTH].sin()


class MoreOperators(Mixer):
    def forward(self, x: Tensor) -> Tensor:
        u = x[..., :WIDTH]
        for _ in range(x.shape[1]):
            u = u.sin()
        return u


class OtherOperands(Mixer):
    def forward(self, x: Tensor) -> Tensor:
        a, b = x[..., :WIDTH].sin(), x[..., WIDTH : 2 * WIDTH].sin()
        return a - b if x.shape[1] % 2 else b - a


class OtherOptions(Mixer):
    def forward(self, x: Tensor) -> Tensor:
        return F.gelu(x[..., :WIDTH], approximate="tanh" if x.shape[1] % 2 else "none")


class MoreOperands(Mixer):
    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x[..., :WIDTH]] * x.shape[1], dim=-1)[..., :WIDTH]


class OtherConstant(Mixer):
    def forward(self, x: Tensor) -> Tensor:
        return x[..., :WIDTH] * torch.tensor(1.0 / x.shape[1])


class RootOfTheLength(Mixer):
    def forward(self, x: Tensor) -> Tensor:
        return x[..., :WIDTH] * x.shape[1] ** -0.5


class HalfTheLength(Mixer):
    def forward(self, x: Tensor) -> Tensor:
        time, n = x.shape[1], 5 * (x.shape[1] // 2)
        spectrum = torch.fft.rfft(x[..., :WIDTH].mT, n=n) * torch.fft.rfft(self.taps[:, :time], n=n)
        return torch.fft.irfft(spectrum, n=n)[..., :time].mT


class Strided(Mixer):
    def forward(self, x: Tensor) -> Tensor:
        y = F.conv1d(F.pad(x.mT, (1, 0)), self.short.weight[..., :2], stride=2, groups=3 * WIDTH)
        return y.repeat_interleave(2, dim=-1)[:, :WIDTH, :1].mT


CHANGES = {
    OtherOperators: "the program changes with the sequence length: aten.sin.default becomes aten.cos.default",
    MoreOperators: "the program changes with the sequence length: aten.linear.default becomes aten.sin.default",
    OtherOperands: "the program changes with the sequence length: aten.sub.Tensor reads sin_1 at one length and sin at",
    OtherOptions: "the program changes with the sequence length: aten.gelu.default reads 0 values at one length and 1",
    MoreOperands: "the program changes with the sequence length: aten.cat.default reads 29 values at one length and 32",
    RootOfTheLength: r"aten.mul.Tensor: a number is 0.18898\d* at 5 × 28 and 0.17960\d* at 7 × 31, which follows",
    HalfTheLength: "aten.fft_rfft.default: a size is 70 at 5 × 28 and 75 at 7 × 31, which follows neither",
    Strided: "aten.conv1d.default: a size is 14 at 5 × 28 and 16 at 7 × 31, which follows neither",
}


@pytest.mark.parametrize("mixer", CHANGES, ids=lambda mixer: mixer.__name__)
def test_a_program_that_changes_with_the_length(mixer: type[Mixer]) -> None:
    message = refusal(tiny(mixer))
    where = r"layers\.0\.(mixer|out_proj)"
    assert re.fullmatch(rf"{where}: {CHANGES[mixer]}.* \(.+\.py:\d+: .+\)", message), message


def test_a_constant_that_changes_with_the_length() -> None:
    message = refusal(tiny(OtherConstant))
    assert re.fullmatch(r"the constant \S*lifted_tensor_0 changes with the sequence length", message), message


# ---- modules that have no program ----------------------------------------------------------------------------------


class Random(Mixer):
    def forward(self, x: Tensor) -> Tensor:
        return x[..., :WIDTH] + torch.randn(WIDTH)


class TrainingDropout(Mixer):
    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(x[..., :WIDTH], 0.5, training=True)


@pytest.mark.parametrize(("mixer", "operator"), [(Random, "randn"), (TrainingDropout, "dropout")])
def test_a_random_module(mixer: type[Mixer], operator: str) -> None:
    pattern = rf"layers\.0\.mixer: aten\.{operator}\.default: is random: the module has no fixed output \(.+\)"
    assert re.fullmatch(pattern, refusal(tiny(mixer)))


class LooksAtValues(Mixer):
    def forward(self, x: Tensor) -> Tensor:
        return x[..., :WIDTH] if bool(x.sum() > 0) else -x[..., :WIDTH]


class Fails(Mixer):
    def forward(self, x: Tensor) -> Tensor:
        raise RuntimeError("the first line\nand the second")


@pytest.mark.parametrize(
    ("mixer", "reason"), [(LooksAtValues, ".*data-dependent.*"), (Fails, "the first line")], ids=["values", "fails"]
)
def test_a_module_that_cannot_be_exported(mixer: type[Mixer], reason: str, capfd: pytest.CaptureFixture[str]) -> None:
    message = refusal(tiny(mixer))
    assert re.fullmatch(rf"torch\.export cannot trace the module at 5 × 28: {reason}", message), message
    assert capfd.readouterr().err == ""


class Doubles(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x[..., :8] * 2


def test_a_scripted_module_cannot_be_exported() -> None:
    """Scripted functions can: see recognize/test_heads."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        scripted = torch.jit.script(Doubles())
    message = refusal(tiny(lambda: scripted))  # type: ignore[arg-type]
    assert message == "layers.0.mixer: is a TorchScript module; torch.export takes the plain one"


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_weights_that_are_no_numbers(value: float) -> None:
    loaded = tiny(Hyena)
    loaded.module.layers[0].out_proj.weight[2, 3] = value
    assert refusal(loaded) == "the weight layers.0.out_proj.weight holds NaN or infinite numbers"


def test_an_infinite_constant_is_not_a_weight() -> None:
    class Masked(Mixer):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("mask", torch.tensor([0.0] * 7 + [float("-inf")]))

        def forward(self, x: Tensor) -> Tensor:
            return (x[..., :WIDTH] + self.mask).softmax(-1)

    capture(tiny(Masked))


class Output(nn.Module):
    def __init__(self, change: str) -> None:
        super().__init__()
        self.inner, self.change = tiny(Mixed).module, change

    def forward(self, input_ids: Tensor) -> object:
        logits = self.inner(input_ids)
        if self.change == "transposed":
            return logits.mT
        if self.change == "last":
            return logits[:, -1]
        if self.change == "shifted":
            return logits[:, :-1]
        if self.change == "merged":
            return logits.flatten(0, 1)
        return (logits, logits)


@pytest.mark.parametrize(
    ("change", "shape"),
    [("transposed", "[B, 20, T]"), ("last", "[B, 20]"), ("shifted", "[B, T-1, 20]"), ("merged", "[B·(T), 20]")],
)
def test_an_output_that_is_not_one_row_of_logits_per_token(change: str, shape: str) -> None:
    message = refusal(LoadedModel(Output(change).eval(), "module", CONTEXT, 0, "tests"))
    assert message == f"the module's output is {shape}, not [batch, length, vocabulary]"
