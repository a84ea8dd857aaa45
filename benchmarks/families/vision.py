"""Images: classification, embeddings, and encoders of images and text together."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.families.base import VOCABULARY, Built, Domain, Inputs, image, text
from benchmarks.families.stubs import imported
from graphprune.models.zoo.tiny import tiny

VISION = Domain("Images")
PATCHES: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "image_size": 32,
    "patch_size": 8,
}
_STAGES: dict[str, Any] = {"depths": [1, 1, 1, 1], "hidden_sizes": [16, 24, 32, 48]}
_SWIN: dict[str, Any] = {
    "image_size": 32,
    "patch_size": 2,
    "embed_dim": 16,
    "depths": [2, 2],
    "num_heads": [2, 4],
    "window_size": 4,
}


def _images(name: str, stem: str, side: int = 32, **options: Any) -> None:
    VISION.hf(name, f"{stem}ForImageClassification", f"{stem}Config", options, image(side))


def _both() -> Inputs:
    return {**text(8), **image()()}


def _mixer() -> Built:
    module = imported("timm.models.mlp_mixer")
    model = module.MlpMixer(num_classes=5, img_size=32, patch_size=8, num_blocks=2, embed_dim=32)
    return model, (torch.randn(2, 3, 32, 32),)


VISION.tiny("ViT", "tiny-vit")
VISION.tiny("DeiT", "tiny-deit")
VISION.tiny("ViT, fused QKV", "tiny-fused-vit")
_images("BEiT", "Beit", **PATCHES, use_relative_position_bias=True, out_indices=[1, 2])
_images("DINOv2", "Dinov2", **{**PATCHES, "mlp_ratio": 2})
VISION.hf("DINOv3", "DINOv3ViTModel", "DINOv3ViTConfig", PATCHES, image())
_TOWER: dict[str, Any] = {k: v for k, v in PATCHES.items()}
_WORDS: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "max_position_embeddings": 16,
    "eos_token_id": 98,
    "bos_token_id": 1,
    "pad_token_id": 0,
}
VISION.hf(
    "CLIP",
    "CLIPModel",
    "CLIPConfig",
    {"text_config": _WORDS, "vision_config": _TOWER, "projection_dim": 16},
    _both,
)
VISION.hf(
    "SigLIP",
    "SiglipModel",
    "SiglipConfig",
    {"text_config": {**_WORDS, "projection_size": 32}, "vision_config": _TOWER},
    lambda: {"input_ids": text(16)["input_ids"], **image()()},
)
_images("Swin", "Swin", **_SWIN)
_images("Swin V2", "Swinv2", **_SWIN, pretrained_window_sizes=[0, 0])
_images(
    "PVT",
    "PvtV2",
    image_size=32,
    depths=[1, 1, 1, 1],
    hidden_sizes=[16, 16, 32, 32],
    num_attention_heads=[1, 2, 4, 4],
    sr_ratios=[4, 2, 1, 1],
    mlp_ratios=[2, 2, 2, 2],
)
_images("PoolFormer", "PoolFormer", **_STAGES, num_encoder_blocks=4, side=64)
_images(
    "LeViT",
    "Levit",
    image_size=64,
    hidden_sizes=[32, 48, 64],
    num_attention_heads=[2, 3, 4],
    depths=[1, 1, 1],
    key_dim=[8, 8, 8],
    side=64,
)
_images("ConvNeXt", "ConvNext", **_STAGES, side=64)
_images("ConvNeXt V2", "ConvNextV2", **_STAGES, side=64)
_images("ResNet", "ResNet", **_STAGES, embedding_size=16, layer_type="bottleneck", side=64)
_images("BiT (ResNet V2)", "Bit", **_STAGES, embedding_size=16, num_groups=4, side=64)
_images("RegNet", "RegNet", **_STAGES, embedding_size=16, groups_width=8, side=64)
_images("MobileNet V1", "MobileNetV1", depth_multiplier=0.25, side=64)
_images("MobileNet V2", "MobileNetV2", depth_multiplier=0.25, side=64)
VISION.timm("MobileNet V3", "mobilenetv3_small_050")
_images(
    "EfficientNet",
    "EfficientNet",
    width_coefficient=0.25,
    depth_coefficient=0.3,
    hidden_dim=320,
    image_size=64,
    side=64,
)
_images(
    "MobileViT",
    "MobileViT",
    hidden_sizes=[16, 24, 32],
    neck_hidden_sizes=[8, 8, 16, 16, 24, 32, 32],
    num_attention_heads=4,
    image_size=64,
    side=64,
    mlp_ratio=2.0,
    expand_ratio=2.0,
)
_images("MobileViT V2", "MobileViTV2", width_multiplier=0.25, image_size=64, side=64)
VISION.timm("DenseNet", "densenet121", growth_rate=8, block_config=(2, 2, 2))
VISION.timm("GhostNet", "ghostnet_050")
VISION.add("MLP-Mixer", _mixer)
VISION.timm("XCiT", "xcit_nano_12_p16_224", 32, img_size=32, patch_size=8, embed_dim=32, depth=2)
_SMALL: dict[str, Any] = {"layers": (1, 1, 1, 1), "channels": (8, 16, 24, 32)}
VISION.timm("SE-ResNet", "seresnet18", **_SMALL)
VISION.timm("Res2Net", "res2net50_26w_4s", **_SMALL, base_width=26)
VISION.timm("ResNeSt", "resnest14d", **_SMALL, stem_width=8)


class ShuffleUnit(nn.Module):
    """A unit of ShuffleNet V1: grouped convolutions with a shuffle between them; stride 1 or 2."""

    def __init__(self, into: int, out: int, stride: int, groups: int = 2) -> None:
        super().__init__()
        inner = out // 4
        self.stride, self.groups = stride, groups
        branch = out - into if stride == 2 else out
        self.squeeze = nn.Conv2d(into, inner, 1, groups=groups, bias=False)
        self.norm1 = nn.BatchNorm2d(inner)
        self.depthwise = nn.Conv2d(inner, inner, 3, stride, 1, groups=inner, bias=False)
        self.norm2 = nn.BatchNorm2d(inner)
        self.expand = nn.Conv2d(inner, branch, 1, groups=groups, bias=False)
        self.norm3 = nn.BatchNorm2d(branch)

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.norm1(self.squeeze(x)))
        h = self.norm2(self.depthwise(F.channel_shuffle(h, self.groups)))
        h = self.norm3(self.expand(h))
        if self.stride == 1:
            return F.relu(x + h)
        return F.relu(torch.cat([F.avg_pool2d(x, 3, 2, 1), h], 1))


class SplitUnit(nn.Module):
    """A unit of ShuffleNet V2: half of the channels pass, both halves are shuffled."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        half = channels // 2
        self.passed = half
        self.branch = nn.Sequential(
            nn.Conv2d(half, half, 1, bias=False),
            nn.BatchNorm2d(half),
            nn.ReLU(),
            nn.Conv2d(half, half, 3, 1, 1, groups=half, bias=False),
            nn.BatchNorm2d(half),
            nn.Conv2d(half, half, 1, bias=False),
            nn.BatchNorm2d(half),
            nn.ReLU(),
        )

    def forward(self, x: Tensor) -> Tensor:
        passed, branch = x.split(self.passed, 1)
        return F.channel_shuffle(torch.cat([passed, self.branch(branch)], 1), 2)


def _stem(channels: int) -> list[nn.Module]:
    return [nn.Conv2d(3, channels, 3, 2, 1, bias=False), nn.BatchNorm2d(channels), nn.ReLU()]


def _classified(channels: int) -> list[nn.Module]:
    return [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 5)]


def _shufflenet_v1() -> Built:
    units = [ShuffleUnit(16, 32, 2), ShuffleUnit(32, 32, 1), ShuffleUnit(32, 64, 2)]
    return nn.Sequential(*_stem(16), *units, *_classified(64)), (torch.randn(2, 3, 32, 32),)


def _shufflenet_v2() -> Built:
    down = [nn.Conv2d(32, 64, 3, 2, 1), nn.BatchNorm2d(64), nn.ReLU()]
    units = [SplitUnit(32), SplitUnit(32), *down, SplitUnit(64)]
    return nn.Sequential(*_stem(32), *units, *_classified(64)), (torch.randn(2, 3, 32, 32),)


class Fire(nn.Module):
    """SqueezeNet's module: a narrow convolution read by two, concatenated."""

    def __init__(self, into: int, squeeze: int, expand: int) -> None:
        super().__init__()
        self.squeeze = nn.Conv2d(into, squeeze, 1)
        self.small = nn.Conv2d(squeeze, expand, 1)
        self.large = nn.Conv2d(squeeze, expand, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.squeeze(x).relu()
        return torch.cat([self.small(h).relu(), self.large(h).relu()], 1)


def _squeezenet() -> Built:
    layers = [
        nn.Conv2d(3, 16, 3, 2),
        nn.ReLU(),
        nn.MaxPool2d(3, 2),
        Fire(16, 8, 16),
        Fire(32, 8, 16),
        nn.Conv2d(32, 5, 1),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
    ]
    return nn.Sequential(*layers), (torch.randn(2, 3, 32, 32),)


VISION.add("ShuffleNet V1", _shufflenet_v1)
VISION.add("ShuffleNet V2", _shufflenet_v2)
VISION.add("SqueezeNet", _squeezenet)
VISION.add("CNN with a residual", lambda: tiny("tiny-cnn"), ("height", "width"))
