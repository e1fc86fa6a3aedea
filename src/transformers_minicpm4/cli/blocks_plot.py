"""Which blocks the queries of one layer read: recorded while the model works, counted, and drawn."""

import importlib.util
import os
from dataclasses import dataclass
from pathlib import Path

from .errors import UserError


FORMATS = (".png", ".svg", ".pdf")
# Colours that stay apart for colour-blind readers and in grey.
SKIPPED, WINDOW, INITIAL, SELECTED, ALL = "#e4e4e4", "#4477aa", "#1b1b3a", "#ee7733", "#f7d2b5"


def check(file: str | None) -> None:
    """Finds out before any work whether the picture can be drawn and written."""
    if file is None:
        return
    path = Path(file).expanduser()
    if path.suffix.lower() not in FORMATS:
        raise UserError(f"--plot {file!r} does not name a picture; end it in {', '.join(FORMATS)}.")
    if importlib.util.find_spec("matplotlib") is None:
        raise UserError(
            "--plot draws with matplotlib, which is not installed; install the extra that has it: "
            "pip install 'transformers_minicpm4[notebooks]'"
        )
    if path.is_dir() or not path.parent.is_dir() or not os.access(path if path.exists() else path.parent, os.W_OK):
        raise UserError(f"--plot {file!r} cannot be written; give a file in an existing folder that is writable.")


@dataclass
class Blocks:
    """`read` is bool `[G, S, M]`: block `M` is read by key/value head `G` for the query at `first + S`."""

    read: "torch.Tensor"  # noqa: F821 - torch is imported inside functions, so that help costs nothing
    first: int

    def visible_tokens(self):
        """Tokens at or before each query, `[S]`."""
        import torch

        return torch.arange(self.first, self.first + self.read.shape[1]) + 1

    def read_tokens(self, block_size: int):
        """Tokens that each query read, `[S]`: the mean over the key/value heads."""
        import torch

        blocks = torch.arange(self.read.shape[2]) * block_size
        seen = (self.visible_tokens()[:, None] - blocks).clamp(0, block_size)  # of its own block only a part
        return (self.read * seen).sum(-1).double().mean(0)


class Recorder:
    """
    Keeps what the middle layer is given, and says afterwards which blocks its queries read.

    The rule is run a second time on that layer's own queries and on the keys of the cache, after the answer: nothing
    that is timed pays for it.
    """

    def __init__(self, model):
        self.layer = model.config.num_hidden_layers // 2
        self.attention = model.model.layers[self.layer].self_attn
        self.hook = self.attention.register_forward_pre_hook(self._keep, with_kwargs=True)
        self._calls = []

    def _keep(self, module, args, kwargs):
        self._calls.append((kwargs["hidden_states"], *kwargs["position_embeddings"]))

    def take(self, cache, settings) -> Blocks:
        """The blocks of all queries since the last call, which are the last ones in the cache."""
        import torch

        from ..infllm_v2 import infllm_v2_attention
        from ..model.modeling_minicpm4 import apply_rotary_pos_emb

        hidden, cos, sin = (torch.cat(parts, dim=1) for parts in zip(*self._calls))
        self._calls.clear()
        with torch.no_grad():
            query = self.attention.q_proj(hidden)
            query = query.view(*hidden.shape[:2], -1, self.attention.head_dim).transpose(1, 2)
            rotated, _ = apply_rotary_pos_emb(query, query, cos, sin)
            layer = cache.layers[self.layer]
            _, blocks = infllm_v2_attention(
                rotated,
                layer.keys,
                layer.values,
                settings,
                selection_query=query,
                compressed_keys=layer.compressed_keys,
                scaling=self.attention.scaling,
                return_blocks=True,
            )
        return Blocks(blocks[0].cpu(), layer.get_seq_length() - hidden.shape[1])

    def forget(self) -> None:
        self._calls.clear()

    def close(self) -> None:
        self.hook.remove()


def classify(blocks: Blocks, settings, head: int):
    """Each block to each query, uint8 `[S, M]`: 0 future, 1 skipped, 2 window, 3 initial, 4 selected, 5 not sparse."""
    import torch

    read = blocks.read[head]
    index = torch.arange(read.shape[1])
    own = (blocks.visible_tokens() - 1)[:, None] // settings.block_size
    past = index <= own
    window = past & (index >= own - settings.window_blocks)
    initial = past & (index < settings.init_blocks)
    everything = (read == past).all(-1, keepdim=True)
    kind = torch.zeros(read.shape, dtype=torch.uint8)
    kind[past & ~read] = 1
    kind[read] = 4
    kind[read & everything] = 5
    kind[window] = 2
    kind[initial] = 3
    return kind


def farthest_head(blocks: Blocks) -> int:
    """The key/value head whose reads lie farthest back; many heads read little beyond their neighbourhood."""
    import torch

    return int((blocks.read * torch.arange(blocks.read.shape[2])).sum((1, 2)).argmin())


def draw(file: str, layer: int, settings, document: Blocks, asked: list[tuple[str, Blocks, int | None]]) -> str:
    """
    Write the picture, and return a line that says what it shows.

    Args:
        asked: for each question its label, what question and answer read, and the block of the known answer.
    """
    from matplotlib.colors import ListedColormap
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    colours = ListedColormap(["white", SKIPPED, WINDOW, INITIAL, SELECTED, ALL])
    head = farthest_head(document)
    heights = [5.2, *[0.75] * len(asked)]
    figure = Figure(figsize=(10, 2.6 + sum(heights)), layout="constrained")
    axes = figure.subplots(len(heights), 1, sharex=True, height_ratios=heights, squeeze=False)[:, 0]
    num_blocks = max(blocks.read.shape[2] for blocks in (document, *(blocks for _, blocks, _ in asked)))

    def show(axis, blocks):
        kind = classify(blocks, settings, head)
        first, last = blocks.first, blocks.first + kind.shape[0]
        axis.imshow(
            kind.numpy(), cmap=colours, vmin=0, vmax=5, aspect="auto", interpolation="nearest",
            extent=(0, kind.shape[1], last, first),
        )  # fmt: skip
        axis.set_xlim(0, num_blocks)

    show(axes[0], document)
    axes[0].set_ylabel("position of the query in the text (tokens)")
    for axis, (label, blocks, answer) in zip(axes[1:], asked):
        show(axis, blocks)
        axis.set_yticks([])
        axis.set_ylabel(label, rotation=0, ha="right", va="center")
        if answer is not None:
            axis.plot([answer + 0.5], [1.0], "v", transform=axis.get_xaxis_transform(), clip_on=False, color="black")
    axes[-1].set_xlabel(f"block of the text ({settings.block_size} tokens each)")
    heads = document.read.shape[0]
    settled = "" if settings.dense_len < 1 else f", dense below {settings.dense_len:,} tokens"
    figure.suptitle(
        f"Blocks that sparse attention reads: layer {layer + 1}, key/value head {head + 1} of {heads} "
        f"(looks back farthest)\ntopk {settings.topk} blocks, window {settings.window_size} tokens{settled}"
    )
    entries = [
        Patch(color=INITIAL, label="initial, always read"),
        Patch(color=WINDOW, label="window, always read"),
        Patch(color=SELECTED, label="selected by score"),
        Patch(color=ALL, label="read, as all before it: not sparse yet"),
        Patch(color=SKIPPED, label="could have been read, was not"),
    ]
    if any(answer is not None for _, _, answer in asked):
        marker = Line2D([], [], linestyle="none", marker="v", color="black", label="block with the known answer")
        entries.append(marker)
    figure.legend(handles=entries, loc="outside lower center", ncols=3, frameon=False)
    try:
        figure.savefig(Path(file).expanduser(), dpi=120)
    except OSError as error:
        raise UserError(f"The picture {file!r} cannot be written: {error.strerror}.") from error
    return f"picture: {file} (layer {layer + 1}; above the queries of the text, below those of question and answer)"
