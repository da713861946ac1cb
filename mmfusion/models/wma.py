"""Late fusion of token sequences by a transformer, whose modalities a Wasserstein distance aligns (Zhi et al., 2025).

The tokens of all modalities are projected to one width, told apart by an embedding of their modality and of their
place, and attend to each other in a few layers, from a random start or one of given weights (`mmfusion.models.vilt`);
the mean of the tokens that come out is read out.
What the alignment sees are the tokens after each layer (`TokenOutput.layers`); it has no parameters of its own
(`mmfusion.training.objective`).
"""

from collections.abc import Collection, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmfusion.models.heads import Rescale, Standardise
from mmfusion.models.tokens import TokenOutput, draw_tokens, hide, masked_mean
from mmfusion.sequences import Tokens

MOST_LAYERS = 64


class TransformerLayer(nn.Module):
    """Self-attention and a feed-forward part, each behind a layer norm and beside a shortcut.

    Args:
        width: W of the tokens, a multiple of `heads`.
        hidden_dim: width of the feed-forward part; default: 2 W.
        epsilon: of the layer norms.
    """

    def __init__(self, width: int, heads: int, hidden_dim: int | None = None, epsilon: float = 1e-5) -> None:
        super().__init__()
        hidden_dim = hidden_dim or 2 * width
        self.heads = heads
        self.before_attention = nn.LayerNorm(width, epsilon)
        self.project_in = nn.Linear(width, 3 * width)
        self.project_out = nn.Linear(width, width)
        self.before_hidden = nn.LayerNorm(width, epsilon)
        self.hidden = nn.Linear(width, hidden_dim)
        self.readout = nn.Linear(hidden_dim, width)

    def forward(self, x: Tensor, mask: Tensor, kept: tuple[Tensor, Tensor] | None = None) -> Tensor:
        """Tokens (B, T, W) and mask (B, T) -> (B, T, W); `kept`, two of (B, 1, W), multiplies what is added."""
        batch, length, width = x.shape
        # (3, B, H, T, W / H)
        query, key, value = (
            self.project_in(self.before_attention(x))
            .reshape(batch, length, 3, self.heads, width // self.heads)
            .permute(2, 0, 3, 1, 4)
        )
        # finite, so that a sequence of nothing but padding gives numbers: they are masked wherever they are used
        lowest = torch.finfo(query.dtype).min / 2
        bias = ((1 - mask) * lowest).to(query.dtype)[:, None, None, :]
        seen = F.scaled_dot_product_attention(query, key, value, attn_mask=bias)
        added = self.project_out(seen.transpose(1, 2).reshape(batch, length, width))
        x = x + (added * kept[0] if kept else added)
        added = self.readout(F.gelu(self.hidden(self.before_hidden(x))))
        return x + (added * kept[1] if kept else added)


class TokenTransformer(nn.Module):
    """One member: standardisation, a projection of each modality, and the transformer over all their tokens.

    Args:
        input_dims: width d_m of each modality; modalities are taken in the order of their names.
        width: W of the transformer, a multiple of `heads`.
        layers, heads: of the transformer.
        output_dim: O.
        places: length of the table of positions; later tokens share the last of them.
        dropout: share of the channels of what a layer adds that are set to 0 in training, in all tokens of an example
            alike (Gal & Ghahramani, 2016).
        hidden_dim, epsilon: of the layers, as `TransformerLayer`.
        embedded_inputs: modalities whose tokens are embeddings of this transformer already; once projected they enter
            without a layer norm.

    Raises ValueError for a width that the heads do not divide, or that an embedded input does not have.
    """

    def __init__(
        self,
        input_dims: Mapping[str, int],
        width: int = 128,
        layers: int = 2,
        heads: int = 8,
        output_dim: int = 1,
        places: int = 128,
        dropout: float = 0.1,
        hidden_dim: int | None = None,
        epsilon: float = 1e-5,
        embedded_inputs: Collection[str] = (),
    ) -> None:
        super().__init__()
        if width % heads:
            raise ValueError(f"width {width} is no multiple of heads {heads}")
        input_dims = dict(sorted(input_dims.items()))
        other = [name for name in embedded_inputs if input_dims.get(name) != width]
        if other:
            raise ValueError(f"embedded input {other[0]!r} is {input_dims.get(other[0], 0)} wide, not {width}")
        self.modalities, self.embedded_inputs = tuple(input_dims), tuple(embedded_inputs)
        self.width, self.dropout = width, dropout
        self.standardise = nn.ModuleDict({name: Standardise(dim) for name, dim in input_dims.items()})
        self.project = nn.ModuleDict({name: nn.Linear(dim, width) for name, dim in input_dims.items()})
        self.places = nn.ParameterDict({name: nn.Parameter(torch.randn(places, width) * 0.02) for name in input_dims})
        self.kinds = nn.ParameterDict({name: nn.Parameter(torch.randn(width) * 0.02) for name in input_dims})
        self.embedded = nn.LayerNorm(width)
        self.layers = nn.ModuleList(TransformerLayer(width, heads, hidden_dim, epsilon) for _ in range(layers))
        self.norm = nn.LayerNorm(width, epsilon)
        self.readout = nn.Linear(width, output_dim)
        self.rescale = Rescale(output_dim)

    @property
    def uniforms(self) -> int:
        """How many uniform numbers `forward` takes for each example: of the drawn tokens, then of the dropout."""
        return len(self.modalities) + (2 * len(self.layers) * self.width if self.dropout else 0)

    def forward(
        self,
        features: Mapping[str, Tokens],
        present: Mapping[str, Tensor] | None = None,
        kept: Mapping[str, Tensor] | None = None,
        uniforms: Tensor | None = None,
    ) -> TokenOutput:
        """Prediction (B, O) of raw tokens (B, T_m, d_m); what finite numbers stand at padding never matters.

        `present` (B,) hides a modality where it is 0; `kept` (B, d_m) multiplies the standardised tokens. With
        `uniforms` (B, self.uniforms) channels are dropped, and one token of the last layer of each example comes back.
        """
        seen = hide(features, present)
        parts, lengths = [], [seen[name].values.shape[-2] for name in self.modalities]
        for name, length in zip(self.modalities, lengths, strict=True):
            x = self.standardise[name](seen[name].values)
            x = self.project[name](x * kept[name].unsqueeze(-2) if kept else x)
            table = self.places[name]
            place = torch.arange(length, device=x.device).clamp_max(len(table) - 1)
            x = x if name in self.embedded_inputs else self.embedded(x)
            parts.append(x + table[place] + self.kinds[name])
        x, mask = torch.cat(parts, -2), torch.cat([seen[name].mask for name in self.modalities], -1)
        outputs = []
        for layer, dropped in zip(self.layers, self._dropped(uniforms), strict=True):
            x = layer(x, mask, dropped)
            split = zip(self.modalities, x.split(lengths, -2), strict=True)
            outputs.append({name: Tokens(part, seen[name].mask) for name, part in split})
        x = self.norm(x)
        prediction = self.rescale(self.readout(masked_mean(x, mask)))
        if uniforms is None:
            return TokenOutput(prediction, outputs)
        last = dict(zip(self.modalities, x.split(lengths, -2), strict=True))
        whole = {name: features[name].mask for name in self.modalities}
        return TokenOutput(prediction, outputs, draw_tokens(last, whole, uniforms))

    def _dropped(self, uniforms: Tensor | None) -> list[tuple[Tensor, Tensor] | None]:
        """What each layer's two additions are multiplied by: (B, 1, W) of 0 and 1 / (1 - rate)."""
        if uniforms is None or not self.dropout:
            return [None] * len(self.layers)
        kept = (uniforms[:, len(self.modalities) :] >= self.dropout).float() / (1 - self.dropout)
        parts = kept.unsqueeze(1).split(self.width, -1)
        return list(zip(parts[::2], parts[1::2], strict=True))

    def extra_repr(self) -> str:
        return f"width={self.width}, dropout={self.dropout}"
