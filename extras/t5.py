"""T5's encoder, frozen, and its tokenizer (arXiv:1910.10683): the text encoder of the published MusicGen models.

Like the codec, it has its weights in a file of its own. Checkpoints store its `id`. Letters: B batch, L tokens.
"""

import functools
import hashlib
import math

import safetensors
import torch
import torch.nn.functional as F

from common import UserError, first_line

MAX_TOKENS, END = 512, 1  # T5's longest text, and the id of its end token, </s>
MAX_DISTANCE = 128  # tokens; all larger distances share a bucket


class T5Encoder:
    """T5's encoder in float32, without gradient. file: safetensors with the published names.

    dim: the states' width. id: width and hash. Not a module, so a model's state dict does not contain its weights.
    """

    def __init__(self, file):
        self.file, digest = file, hashlib.sha256()
        try:
            with safetensors.safe_open(file, "pt") as opened, torch.device("cpu"):  # models may be built on "meta"
                names = [name for name in opened.keys() if name.startswith(("shared.", "encoder."))]
                tensors = {name.removeprefix("encoder."): opened.get_tensor(name) for name in names}
                if "embed_tokens.weight" in tensors:  # T5 files store the table under either name, or both
                    tensors["shared.weight"] = tensors.pop("embed_tokens.weight")
                for name in sorted(tensors):
                    digest.update(name.encode() + tensors[name].contiguous().view(torch.uint8).numpy().tobytes())
                # copied, because the file is mapped and another program may overwrite it
                self.weights = {name: tensor.to(torch.float32, copy=True) for name, tensor in tensors.items()}
                self.dim = self.weights["shared.weight"].shape[1]
                self.id = f"t5-{self.dim}-{digest.hexdigest()[:8]}"
                self(torch.tensor([[END]]), torch.tensor([[True]]))  # fails if a tensor is missing or does not fit
        except Exception as error:
            raise UserError(f"text_encoder_weights '{file}': not a T5 encoder ({first_line(error)}); pass"
                            " --text_encoder_weights=FILE, such as a t5.safetensors") from None  # fmt: skip

    def __reduce__(self):  # copies of a model, and data workers, share the encoder
        return load_encoder, (self.file,)

    @torch.no_grad()
    def __call__(self, ids, mask):
        """ids int64 [B, L], mask bool [B, L], at least one True per row -> states float32 [B, L, dim]."""
        if self.weights["shared.weight"].device != ids.device:
            self.weights = {name: tensor.to(ids.device) for name, tensor in self.weights.items()}
        w = {name.removesuffix(".weight"): tensor for name, tensor in self.weights.items()}
        norm = functools.partial(F.rms_norm, normalized_shape=(self.dim,), eps=1e-6)
        with torch.autocast(ids.device.type, enabled=False):  # float16 overflows
            x = w["shared"][ids]
            table = w["block.0.layer.0.SelfAttention.relative_attention_bias"]  # [buckets, heads]
            bias = table[relative_buckets(ids.shape[1], len(table), ids.device)].permute(2, 0, 1)
            bias = bias.masked_fill(~mask[:, None, None], -math.inf)  # [B, heads, L, L]
            for layer in range(sum(name.endswith("SelfAttention.q") for name in w)):
                attention, dense = f"block.{layer}.layer.0", f"block.{layer}.layer.1"
                y = norm(x, weight=w[f"{attention}.layer_norm"])
                qkv = (F.linear(y, w[f"{attention}.SelfAttention.{name}"]) for name in "qkv")
                q, k, v = (part.unflatten(2, (table.shape[1], -1)).transpose(1, 2) for part in qkv)
                y = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=1.0)  # T5 does not scale
                x = x + F.linear(y.transpose(1, 2).flatten(2), w[f"{attention}.SelfAttention.o"])
                y = norm(x, weight=w[f"{dense}.layer_norm"])
                dense = f"{dense}.DenseReluDense"
                if f"{dense}.wi" in w:
                    y = F.relu(F.linear(y, w[f"{dense}.wi"]))
                else:
                    y = F.gelu(F.linear(y, w[f"{dense}.wi_0"]), approximate="tanh") * F.linear(y, w[f"{dense}.wi_1"])
                x = x + F.linear(y, w[f"{dense}.wo"])
            return norm(x, weight=w["final_layer_norm"])


@functools.cache
def load_encoder(file):
    """Return the T5Encoder of a file, one copy per process."""
    return T5Encoder(file)


def relative_buckets(L, n, device):
    """Return the bucket of each key's position relative to each query, int64 [L, L]: n / 2 buckets per direction.

    The nearest n / 4 distances have a bucket each; beyond, a bucket's width grows with the logarithm of the distance.
    """
    position, half, near = torch.arange(L, device=device), n // 2, n // 4
    distance = (relative := position - position[:, None]).abs()
    far = near + (torch.log(distance.clamp(min=1) / near) / math.log(MAX_DISTANCE / near) * (half - near)).long()
    return half * (relative > 0) + torch.where(distance < near, distance, far.clamp(max=half - 1))
