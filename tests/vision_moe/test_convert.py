"""Published checkpoints, made here as the layout is described, against its own mathematics."""

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import vision_moe
from mllm.cli import main
from vision_moe import InputError, convert_clip_moe

WIDTH, TEXT_WIDTH, EMBED_DIM, CONTEXT, VOCABULARY = 128, 64, 32, 248, 49408
PATCH, GRID, EXPERTS = 4, 3, 4
EOT = VOCABULARY - 1


def published(
    moe_layers: int = 2, layers: int = 3, dtype: torch.dtype = torch.float32, seed: int = 0
) -> dict[str, Tensor]:
    """A file's content: in each tower the last ``moe_layers`` of ``layers`` blocks are MoE."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int, std: float = 0.08, mean: float = 0.0) -> Tensor:
        return (mean + std * torch.randn(shape, generator=generator)).to(dtype)

    def norm(name: str, width: int) -> dict[str, Tensor]:
        return {f"{name}.weight": draw(width, mean=1.0), f"{name}.bias": draw(width)}

    def linear(name: str, rows: int, columns: int) -> dict[str, Tensor]:
        return {f"{name}.weight": draw(rows, columns), f"{name}.bias": draw(rows)}

    def mlp(name: str, width: int) -> dict[str, Tensor]:
        return {
            **linear(f"{name}.c_fc", 4 * width, width),
            **linear(f"{name}.c_proj", width, 4 * width),
        }

    def blocks(prefix: str, width: int) -> dict[str, Tensor]:
        made: dict[str, Tensor] = {}
        for index in range(layers):
            block = f"{prefix}transformer.resblocks.{index}"
            made[f"{block}.attn.in_proj_weight"] = draw(3 * width, width)
            made[f"{block}.attn.in_proj_bias"] = draw(3 * width)
            made |= linear(f"{block}.attn.out_proj", width, width)
            made |= norm(f"{block}.ln_1", width) | norm(f"{block}.ln_2", width)
            if index < layers - moe_layers:
                made |= mlp(f"{block}.mlp", width)
                continue
            made[f"{block}.gate.weight"] = draw(EXPERTS, width)
            for expert in range(EXPERTS):
                made |= mlp(f"{block}.experts.{expert}", width)
        return made

    return {
        "visual.class_embedding": draw(WIDTH),
        "visual.positional_embedding": draw(1 + GRID**2, WIDTH),
        "visual.conv1.weight": draw(WIDTH, 3, PATCH, PATCH),
        **norm("visual.ln_pre", WIDTH),
        **norm("visual.ln_post", WIDTH),
        "visual.proj": draw(WIDTH, EMBED_DIM),
        **blocks("visual.", WIDTH),
        **blocks("", TEXT_WIDTH),
        "token_embedding.weight": draw(VOCABULARY, TEXT_WIDTH),
        "positional_embedding": draw(CONTEXT, TEXT_WIDTH),
        "positional_embedding_res": draw(CONTEXT, TEXT_WIDTH),
        **norm("ln_final", TEXT_WIDTH),
        "text_projection": draw(TEXT_WIDTH, EMBED_DIM),
        "logit_scale": torch.tensor(4.6052, dtype=dtype),
    }


class Reference:
    """The layout's mathematics in plain operations."""

    def __init__(self, weights: dict[str, Tensor]) -> None:
        self.w = {name: value.float() for name, value in weights.items()}

    def norm(self, name: str, x: Tensor) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], self.w[f"{name}.weight"], self.w[f"{name}.bias"])

    def linear(self, name: str, x: Tensor) -> Tensor:
        return x @ self.w[f"{name}.weight"].T + self.w[f"{name}.bias"]

    def mlp(self, name: str, x: Tensor) -> Tensor:
        h = self.linear(f"{name}.c_fc", x)
        return self.linear(f"{name}.c_proj", h * torch.sigmoid(1.702 * h))

    def attention(self, name: str, x: Tensor, causal: bool) -> Tensor:
        batch, length, width = x.shape
        qkv = x @ self.w[f"{name}.in_proj_weight"].T + self.w[f"{name}.in_proj_bias"]
        q, k, v = qkv.view(batch, length, 3, width // 64, 64).permute(2, 0, 3, 1, 4)
        scores = q @ k.transpose(-2, -1) / 8
        if causal:
            scores = scores + torch.full((length, length), -torch.inf).triu(1)
        mixed = (scores.softmax(-1) @ v).transpose(1, 2).reshape(batch, length, width)
        return self.linear(f"{name}.out_proj", mixed)

    def block(self, name: str, x: Tensor, causal: bool) -> Tensor:
        x = x + self.attention(f"{name}.attn", self.norm(f"{name}.ln_1", x), causal)
        h = self.norm(f"{name}.ln_2", x)
        if f"{name}.gate.weight" not in self.w:
            return x + self.mlp(f"{name}.mlp", h)
        logits = h @ self.w[f"{name}.gate.weight"].T
        weights, chosen = logits.softmax(-1).topk(2, -1)
        weights = weights / weights.sum(-1, keepdim=True)
        every = torch.stack([self.mlp(f"{name}.experts.{j}", h) for j in range(EXPERTS)], 2)
        index = chosen.unsqueeze(-1).expand(*chosen.shape, h.shape[-1])
        return x + (weights.unsqueeze(-1) * every.gather(2, index)).sum(2)

    def blocks(self, prefix: str, x: Tensor, causal: bool) -> Tensor:
        index = 0
        while f"{prefix}.{index}.ln_1.weight" in self.w:
            x = self.block(f"{prefix}.{index}", x, causal)
            index += 1
        return x

    def encode_image(self, pixel_values: Tensor) -> Tensor:
        x = F.conv2d(pixel_values, self.w["visual.conv1.weight"], stride=PATCH)
        x = x.flatten(2).transpose(1, 2)
        cls = self.w["visual.class_embedding"].expand(len(x), 1, -1)
        x = torch.cat([cls, x], 1) + self.w["visual.positional_embedding"]
        x = self.blocks("visual.transformer.resblocks", self.norm("visual.ln_pre", x), False)
        return self.norm("visual.ln_post", x[:, 0]) @ self.w["visual.proj"]

    def encode_text(self, tokens: Tensor) -> Tensor:
        positions = torch.cat(
            [self.w["positional_embedding"][:20], self.w["positional_embedding_res"][20:]]
        )
        x = self.w["token_embedding.weight"][tokens] + positions
        x = self.norm("ln_final", self.blocks("transformer.resblocks", x, True))
        return x[torch.arange(len(x)), tokens.argmax(-1)] @ self.w["text_projection"]


@pytest.fixture
def images() -> Tensor:
    size = PATCH * GRID
    return torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def tokens() -> Tensor:
    tokens = torch.zeros(2, CONTEXT, dtype=torch.long)
    generator = torch.Generator().manual_seed(2)
    for row, length in zip(tokens, (7, 120), strict=True):
        row[:length] = torch.randint(1, EOT, (length,), generator=generator)
        row[length] = EOT
    return tokens


def save_file(content: Any, folder: Path) -> Path:
    path = folder / "published.pt"
    torch.save(content, path)
    return path


@pytest.mark.parametrize("moe_layers", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_encodes_as_the_layout_does(
    tmp_path: Path, images: Tensor, tokens: Tensor, moe_layers: int, dtype: torch.dtype
) -> None:
    content = published(moe_layers=moe_layers, dtype=dtype)
    source = save_file(content, tmp_path)
    convert_clip_moe(source, tmp_path / "clip_moe")
    clip, reference = vision_moe.load(tmp_path / "clip_moe"), Reference(content)
    with torch.no_grad():
        # Worst error measured: 3e-6 of features up to 5.
        torch.testing.assert_close(
            clip.encode_image(images), reference.encode_image(images), atol=2e-5, rtol=1e-5
        )
        torch.testing.assert_close(
            clip.encode_text(tokens), reference.encode_text(tokens), atol=2e-5, rtol=1e-5
        )
    assert clip.logit_scale.item() == pytest.approx(float(content["logit_scale"]))
    assert clip.dtype == torch.float32
    assert clip.config.moe == {
        "num_experts": EXPERTS,
        "top_k": 2,
        "vision_layers": list(range(3 - moe_layers, 3)),
        "text_layers": list(range(3 - moe_layers, 3)),
    }


def test_tokenizer_takes_long_captions(tmp_path: Path) -> None:
    clip = convert_clip_moe(save_file(published(), tmp_path), tmp_path / "clip_moe")
    assert clip.tokenizer(["a red circle " * 60]).shape == (1, CONTEXT)


def test_top_k_is_the_users(tmp_path: Path) -> None:
    source = save_file(published(), tmp_path)
    assert convert_clip_moe(source, tmp_path / "out", top_k=1).config.moe["top_k"] == 1
    with pytest.raises(InputError, match="top_k is 5, it must be from 1 to the 4 experts"):
        convert_clip_moe(source, tmp_path / "out", top_k=5)


def without(key: str) -> Any:
    return lambda content: content.pop(key)


def with_(key: str, value: Any) -> Any:
    return lambda content: content.update({key: value})


BLOCK = "visual.transformer.resblocks.2"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without("visual.conv1.weight"), "visual.conv1.weight is missing"),
        (without(f"{BLOCK}.experts.3.c_fc.bias"), f"{BLOCK}.experts.3.c_fc.bias is missing"),
        (without(f"{BLOCK}.gate.weight"), "does not belong to a CLIP-MoE|is missing"),
        (with_("head.weight", torch.zeros(2, 2)), "head.weight does not belong to a CLIP-MoE"),
        (with_("epoch", 3), "'epoch' is a int, not a tensor"),
        (with_("step", torch.tensor(3)), "step is of type torch.int64"),
        (
            with_("visual.positional_embedding", torch.zeros(9, WIDTH)),
            "has 9 rows, which is no square of patches",
        ),
        (
            with_(f"{BLOCK}.gate.weight", torch.zeros(3, WIDTH)),
            r"blocks with \[3, 4\] experts side by side",
        ),
        (with_("visual.proj", torch.zeros(7, EMBED_DIM)), r"visual.proj has shape \(7, 32\)"),
        (with_("visual.proj", torch.full((WIDTH, EMBED_DIM), torch.nan)), "are not finite"),
        (
            with_("visual.proj", torch.zeros(1).expand(10**9, 10**9)),
            "visual.proj claims more numbers than the file holds",
        ),
        (
            with_("positional_embedding_res", torch.zeros(77, TEXT_WIDTH)),
            r"positional_embedding_res has shape \(77, 64\), positional_embedding \(248, 64\)",
        ),
    ],
)
def test_content_that_does_not_fit_is_named(tmp_path: Path, change: Any, message: str) -> None:
    content = published()
    change(content)
    with pytest.raises(InputError, match=message):
        convert_clip_moe(save_file(content, tmp_path), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("num_bytes", [0, 1, 100, 100_000, -1])
def test_truncated_file(tmp_path: Path, num_bytes: int) -> None:
    source = save_file(published(), tmp_path)
    source.write_bytes(source.read_bytes()[:num_bytes])
    with pytest.raises(InputError, match="damaged"):
        convert_clip_moe(source, tmp_path / "out")


@pytest.mark.parametrize("content", [b"not a checkpoint at all", b"PK\x03\x04" + bytes(100)])
def test_other_bytes(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "file.pt").write_bytes(content)
    with pytest.raises(InputError, match="damaged"):
        convert_clip_moe(tmp_path / "file.pt", tmp_path / "out")


class Bomb:
    def __reduce__(self) -> Any:
        return os.system, ("touch exploded",)


@pytest.mark.parametrize("content", [Bomb(), {"visual.proj": Bomb()}])
def test_a_pickle_is_not_run(
    tmp_path: Path, content: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match="holds more than tensors, or is damaged"):
        convert_clip_moe(save_file(content, tmp_path), tmp_path / "out")
    assert not (tmp_path / "exploded").exists()


@pytest.mark.parametrize("content", [[], {}, torch.zeros(3)])
def test_no_dictionary(tmp_path: Path, content: Any) -> None:
    with pytest.raises(InputError, match="not a dictionary of tensors"):
        convert_clip_moe(save_file(content, tmp_path), tmp_path / "out")


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such file"):
        convert_clip_moe(tmp_path / "none.pt", tmp_path / "out")


def test_command_converts_and_tells_a_fault_in_one_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = save_file(published(layers=2, moe_layers=1), tmp_path)
    arguments = ["convert", "clip-moe", str(source), "--out", str(tmp_path / "clip_moe")]
    with pytest.raises(SystemExit) as done:
        main(arguments)
    assert done.value.code == 0 and "parameters written to" in capsys.readouterr().out
    source.write_bytes(b"x")
    with pytest.raises(SystemExit) as done:
        main(arguments)
    assert done.value.code == 2 and len(capsys.readouterr().err.splitlines()) == 1
    assert vision_moe.load(tmp_path / "clip_moe").config.moe["num_experts"] == EXPERTS
