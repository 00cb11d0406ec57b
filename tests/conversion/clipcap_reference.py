"""ClipCap and CLIP's image encoder as their papers and code define them, in plain torch: what conversions must equal.

The modules carry the names of the published files, so that their state dicts are checkpoints of the exact layout.
Sources: arXiv 2111.09734 with github.com/rmokady/CLIP_prefix_caption, arXiv 2103.00020 with github.com/openai/CLIP.
"""

import torch
import torch.nn.functional as F
from torch import nn
from transformers import GPT2LMHeadModel

# --- CLIP


class QuickGELU(nn.Module):
    def forward(self, x):
        return x * torch.sigmoid(1.702 * x)


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.attn = nn.MultiheadAttention(width, width // 64)
        self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.mlp = nn.Sequential()
        self.mlp.add_module("c_fc", nn.Linear(width, 4 * width))
        self.mlp.add_module("gelu", QuickGELU())
        self.mlp.add_module("c_proj", nn.Linear(4 * width, width))

    def forward(self, x):
        states = self.ln_1(x)
        x = x + self.attn(states, states, states, need_weights=False)[0]
        return x + self.mlp(self.ln_2(x))


class VisionTransformer(nn.Module):
    """Positions come first here, as in OpenAI's code: (positions, images, width)."""

    def __init__(self, size, patch, width, layers, embedding):
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, patch, patch, bias=False)
        self.class_embedding = nn.Parameter(torch.randn(width) / width**0.5)
        self.positional_embedding = nn.Parameter(torch.randn((size // patch) ** 2 + 1, width) / width**0.5)
        self.ln_pre, self.ln_post = nn.LayerNorm(width), nn.LayerNorm(width)
        self.transformer = nn.Module()
        self.transformer.resblocks = nn.Sequential(*(Block(width) for _ in range(layers)))
        self.proj = nn.Parameter(torch.randn(width, embedding) / width**0.5)

    def forward(self, images):
        x = self.conv1(images).flatten(2).permute(2, 0, 1)
        x = torch.cat([self.class_embedding.expand(1, len(images), -1), x]) + self.positional_embedding[:, None]
        x = self.transformer.resblocks(self.ln_pre(x))
        return self.ln_post(x[0]) @ self.proj


class Bottleneck(nn.Module):
    def __init__(self, inputs, width, stride):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(inputs, width, 1, bias=False), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)
        self.conv3, self.bn3 = nn.Conv2d(width, 4 * width, 1, bias=False), nn.BatchNorm2d(4 * width)
        self.avgpool = nn.AvgPool2d(stride)
        self.downsample = None
        if stride > 1 or inputs != 4 * width:
            self.downsample = nn.Sequential()
            self.downsample.add_module("-1", nn.AvgPool2d(stride))
            self.downsample.add_module("0", nn.Conv2d(inputs, 4 * width, 1, bias=False))
            self.downsample.add_module("1", nn.BatchNorm2d(4 * width))

    def forward(self, x):
        states = F.relu(self.bn1(self.conv1(x)))
        states = self.avgpool(F.relu(self.bn2(self.conv2(states))))
        shortcut = x if self.downsample is None else self.downsample(x)
        return F.relu(self.bn3(self.conv3(states)) + shortcut)


class AttentionPool(nn.Module):
    def __init__(self, positions, width, embedding):
        super().__init__()
        self.positional_embedding = nn.Parameter(torch.randn(positions + 1, width) / width**0.5)
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(width, width) for _ in range(3))
        self.c_proj = nn.Linear(width, embedding)

    def forward(self, x):
        x = x.flatten(2).permute(2, 0, 1)
        x = torch.cat([x.mean(0, keepdim=True), x]) + self.positional_embedding[:, None]
        q, k, v = self.q_proj, self.k_proj, self.v_proj
        width = x.shape[-1]
        output, _ = F.multi_head_attention_forward(
            x[:1], x, x, width, width // 64, None, torch.cat([q.bias, k.bias, v.bias]), None, None, False, 0.0,
            self.c_proj.weight, self.c_proj.bias, training=False, need_weights=False, use_separate_proj_weight=True,
            q_proj_weight=q.weight, k_proj_weight=k.weight, v_proj_weight=v.weight,
        )  # fmt: skip
        return output[0]


class ModifiedResNet(nn.Module):
    def __init__(self, size, layers, width, embedding):
        super().__init__()
        self.conv1 = nn.Conv2d(3, width // 2, 3, stride=2, padding=1, bias=False)
        self.conv2 = nn.Conv2d(width // 2, width // 2, 3, padding=1, bias=False)
        self.conv3 = nn.Conv2d(width // 2, width, 3, padding=1, bias=False)
        self.bn1, self.bn2, self.bn3 = (nn.BatchNorm2d(width // 2), nn.BatchNorm2d(width // 2), nn.BatchNorm2d(width))
        inputs = width
        for stage, count in enumerate(layers):
            blocks = []
            for index in range(count):
                blocks.append(Bottleneck(inputs, width * 2**stage, 2 if stage and index == 0 else 1))
                inputs = 4 * width * 2**stage
            setattr(self, f"layer{stage + 1}", nn.Sequential(*blocks))
        self.attnpool = AttentionPool((size // 32) ** 2, inputs, embedding)

    def forward(self, x):
        for number in (1, 2, 3):
            x = F.relu(getattr(self, f"bn{number}")(getattr(self, f"conv{number}")(x)))
        x = F.avg_pool2d(x, 2)
        return self.attnpool(self.layer4(self.layer3(self.layer2(self.layer1(x)))))


class CLIP(nn.Module):
    """The image encoder, and one tensor of the text encoder, which is to be left alone."""

    def __init__(self, visual):
        super().__init__()
        self.visual = visual
        self.ln_final = nn.LayerNorm(8)

    def forward(self, images):
        return self.visual(images)


# --- ClipCap


class MLP(nn.Module):
    def __init__(self, clip_size, width, length):
        super().__init__()
        hidden = width * length // 2
        self.model = nn.Sequential(nn.Linear(clip_size, hidden), nn.Tanh(), nn.Linear(hidden, width * length))

    def forward(self, x):
        return self.model(x)


class Attention(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.to_queries = nn.Linear(width, width, bias=False)
        self.to_keys_values = nn.Linear(width, 2 * width, bias=False)
        self.project = nn.Linear(width, width)

    def forward(self, x):
        rows, positions, width = x.shape
        queries = self.to_queries(x).view(rows, positions, 8, width // 8)
        keys, values = self.to_keys_values(x).view(rows, positions, 2, 8, width // 8).unbind(2)
        scores = torch.einsum("bqhd,bkhd->bqkh", queries, keys) * (width // 8) ** -0.5
        return self.project(torch.einsum("bqkh,bkhd->bqhd", scores.softmax(2), values).reshape(x.shape))


class Layer(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn = Attention(width)
        self.mlp = nn.Module()
        self.mlp.fc1, self.mlp.fc2 = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x):
        x = x + self.attn(self.norm1(x))
        return x + self.mlp.fc2(F.relu(self.mlp.fc1(self.norm2(x))))


class TransformerMapper(nn.Module):
    def __init__(self, clip_size, width, length, clip_length, layers):
        super().__init__()
        self.clip_length = clip_length
        self.transformer = nn.Module()
        self.transformer.layers = nn.ModuleList(Layer(width) for _ in range(layers))
        self.linear = nn.Linear(clip_size, clip_length * width)
        self.prefix_const = nn.Parameter(torch.randn(length, width))

    def forward(self, x):
        constants = self.prefix_const.expand(len(x), -1, -1)
        x = torch.cat([self.linear(x).view(len(x), self.clip_length, -1), constants], dim=1)
        for layer in self.transformer.layers:
            x = layer(x)
        return x[:, self.clip_length :]


class ClipCap(nn.Module):
    def __init__(self, mapper, length, config):
        super().__init__()
        self.length = length
        self.clip_project = mapper
        self.gpt = GPT2LMHeadModel(config)

    def prefix(self, embedding):
        return self.clip_project(embedding).view(len(embedding), self.length, -1)

    def logits(self, prefix, ids):
        """Of a prefix and the tokens behind it, without a cache."""
        words = self.gpt.transformer.wte(ids)
        return self.gpt(inputs_embeds=torch.cat([prefix, words], dim=1), use_cache=False).logits


@torch.no_grad()
def greedy(clipcap, prefix, stop, new_tokens):
    """The tokens of one caption, its stop token among them."""
    ids = []
    while len(ids) < new_tokens and stop not in ids:
        ids.append(clipcap.logits(prefix, torch.tensor([ids], dtype=torch.long))[0, -1].argmax().item())
    return ids


@torch.no_grad()
def beams(clipcap, prefix, stop, new_tokens, beam_size=5):
    """ClipCap's beam search on one prefix: captions with their mean log-probabilities, the best first.

    Written down as lists of (sum of log-probabilities, tokens); captions that have ended compete with the others.
    """
    running = [(0.0, [])]
    for _ in range(new_tokens):
        candidates = []
        for total, ids in running:
            if stop in ids:
                candidates.append((total, ids))
                continue
            log_probs = clipcap.logits(prefix, torch.tensor([ids], dtype=torch.long))[0, -1].log_softmax(-1)
            best = log_probs.topk(beam_size)
            candidates += [
                (total + value, [*ids, token])
                for value, token in zip(best.values.tolist(), best.indices.tolist(), strict=True)
            ]
        running = sorted(candidates, key=lambda beam: beam[0] / len(beam[1]), reverse=True)[:beam_size]
        if all(stop in ids for _, ids in running):
            break
    return [(total / len(ids), ids) for total, ids in running]
