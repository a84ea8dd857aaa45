"""Detection, segmentation, depth, and networks from images to images."""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.families.base import Built, Domain, image
from benchmarks.families.stubs import imported
from benchmarks.families.vision import PATCHES

DETECTION = Domain("Detection, segmentation, images to images")
_RESNET: dict[str, Any] = {
    "embedding_size": 8,
    "hidden_sizes": [8, 16, 24, 32],
    "depths": [1, 1, 1, 1],
    "out_features": ["stage4"],
}
_DETR: dict[str, Any] = {
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
    "num_queries": 6,
    "num_labels": 5,
}


def _with_backbone(stem: str, **options: Any) -> Built:
    transformers = importlib.import_module("transformers")
    backbone = transformers.ResNetConfig(**{**_RESNET, **options.pop("backbone", {})})
    config = getattr(transformers, f"{stem}Config")(
        use_timm_backbone=False,
        use_pretrained_backbone=False,
        backbone=None,
        backbone_config=backbone,
        **options,
    )
    return getattr(transformers, f"{stem}ForObjectDetection")(config), image(64)()


DETECTION.add("DETR", lambda: _with_backbone("Detr", **_DETR))
DETECTION.add("Conditional DETR", lambda: _with_backbone("ConditionalDetr", **_DETR))
DETECTION.add(
    "Deformable DETR",
    lambda: _with_backbone(
        "DeformableDetr",
        **_DETR,
        num_feature_levels=3,
        encoder_n_points=2,
        decoder_n_points=2,
        backbone={"out_features": ["stage2", "stage3", "stage4"]},
    ),
)


def _rt_detr() -> Built:
    transformers = importlib.import_module("transformers")
    backbone = transformers.RTDetrResNetConfig(
        embedding_size=8,
        hidden_sizes=[8, 16, 24, 32],
        depths=[1, 1, 1, 1],
        layer_type="basic",
        out_features=["stage2", "stage3", "stage4"],
    )
    config = transformers.RTDetrConfig(
        backbone_config=backbone,
        encoder_hidden_dim=32,
        encoder_in_channels=[16, 24, 32],
        encoder_ffn_dim=64,
        encoder_attention_heads=4,
        d_model=32,
        num_queries=6,
        num_labels=5,
        decoder_in_channels=[32, 32, 32],
        decoder_ffn_dim=64,
        decoder_layers=2,
        num_denoising=0,
        decoder_attention_heads=4,
        decoder_n_points=2,
        hidden_expansion=0.5,
        use_timm_backbone=False,
        use_pretrained_backbone=False,
        backbone=None,
        anchor_image_size=None,
    )
    return transformers.RTDetrForObjectDetection(config), image(64)()


DETECTION.add("RT-DETR", _rt_detr)
DETECTION.hf(
    "YOLOS",
    "YolosForObjectDetection",
    "YolosConfig",
    {
        **PATCHES,
        "image_size": [32, 32],
        "num_detection_tokens": 5,
        "use_mid_position_embeddings": True,
    },
    image(),
)
DETECTION.hf(
    "SAM's encoder",
    "SamVisionModel",
    "SamVisionConfig",
    {
        **PATCHES,
        "image_size": 64,
        "window_size": 4,
        "global_attn_indexes": [1],
        "output_channels": 16,
        "mlp_dim": 64,
    },
    image(64),
)
DETECTION.hf(
    "DPT",
    "DPTForDepthEstimation",
    "DPTConfig",
    {
        **PATCHES,
        "num_hidden_layers": 4,
        "image_size": 32,
        "backbone_out_indices": [0, 1, 2, 3],
        "is_hybrid": False,
        "neck_hidden_sizes": [8, 16, 24, 32],
        "fusion_hidden_size": 16,
        "head_in_index": -1,
    },
    image(),
)
DETECTION.hf(
    "SegFormer",
    "SegformerForSemanticSegmentation",
    "SegformerConfig",
    {
        "depths": [1, 1, 1, 1],
        "hidden_sizes": [16, 16, 32, 32],
        "sr_ratios": [4, 2, 1, 1],
        "num_attention_heads": [1, 2, 4, 4],
        "mlp_ratios": [2, 2, 2, 2],
        "decoder_hidden_size": 32,
    },
    image(64),
)


def _depth_anything() -> Built:
    transformers = importlib.import_module("transformers")
    backbone = transformers.Dinov2Config(
        **{**PATCHES, "image_size": 28, "patch_size": 14, "num_hidden_layers": 4, "mlp_ratio": 2},
        out_indices=[1, 2, 3, 4],
        apply_layernorm=True,
        reshape_hidden_states=False,
    )
    config = transformers.DepthAnythingConfig(
        backbone_config=backbone,
        reassemble_hidden_size=32,
        neck_hidden_sizes=[8, 16, 24, 32],
        fusion_hidden_size=16,
        head_hidden_size=8,
        patch_size=14,
    )
    return transformers.DepthAnythingForDepthEstimation(config), image(28)()


DETECTION.add("Depth Anything", _depth_anything)


def _mask2former() -> Built:
    transformers = importlib.import_module("transformers")
    backbone = transformers.SwinConfig(
        image_size=64,
        patch_size=4,
        embed_dim=8,
        depths=[1, 1, 1, 1],
        num_heads=[1, 2, 2, 4],
        window_size=2,
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )
    config = transformers.MaskFormerConfig(
        backbone_config=backbone,
        fpn_feature_size=32,
        mask_feature_size=32,
        num_labels=5,
        decoder_config=transformers.DetrConfig(**_DETR),
    )
    return transformers.MaskFormerForInstanceSegmentation(config), image(64)()


DETECTION.add("MaskFormer", _mask2former)


def _yolo(name: str) -> Built:
    tasks = imported("ultralytics.nn.tasks")
    layers = tasks.yaml_model_load(f"{name}.yaml")
    layers["scales"] = {"n": [0.33, 0.125, 256]}  # depth, width, most channels
    model: Any = tasks.DetectionModel(layers, nc=5, verbose=False)
    model.model[-1].export = True  # boxes and scores, as a deployed detector gives them
    model.model[-1].format = "onnx"
    return model, (torch.rand(2, 3, 64, 64),)


for label, file in (("YOLOv5", "yolov5n"), ("YOLOv8", "yolov8n"), ("YOLO11", "yolo11n")):
    DETECTION.add(label, lambda file=file: _yolo(file))  # type: ignore[misc]


class Double(nn.Sequential):
    """Two convolutions of U-Net."""

    def __init__(self, into: int, out: int) -> None:
        layers: list[nn.Module] = []
        for a, b in ((into, out), (out, out)):
            layers += [nn.Conv2d(a, b, 3, padding=1, bias=False), nn.BatchNorm2d(b), nn.ReLU()]
        super().__init__(*layers)


class UNet(nn.Module):
    """U-Net: what goes down is concatenated on the way up."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        sizes = [width, 2 * width, 4 * width]
        self.down = nn.ModuleList(Double(a, b) for a, b in zip([3, *sizes], sizes, strict=False))
        self.bottom = Double(sizes[-1], 2 * sizes[-1])
        self.rise = nn.ModuleList(nn.ConvTranspose2d(2 * s, s, 2, 2) for s in reversed(sizes))
        self.up = nn.ModuleList(Double(2 * s, s) for s in reversed(sizes))
        self.head = nn.Conv2d(width, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        skips = []
        for down in self.down:
            x = down(x)
            skips.append(x)
            x = nn.functional.max_pool2d(x, 2)
        x = self.bottom(x)
        for rise, up, skip in zip(self.rise, self.up, reversed(skips), strict=True):
            x = up(torch.cat([skip, rise(x)], 1))
        return self.head(x)


DETECTION.add("U-Net", lambda: (UNet(), (torch.randn(2, 3, 32, 32),)))


class Sample(nn.Module):
    """A diffusers model whose output is a tensor."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, *args: Tensor) -> Tensor:
        found: Any = self.model(*args, return_dict=False)
        return found[0]


def _unet2d() -> Built:
    model = imported("diffusers").UNet2DModel(
        sample_size=16,
        in_channels=3,
        out_channels=3,
        layers_per_block=1,
        block_out_channels=(16, 32),
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        norm_num_groups=4,
        attention_head_dim=8,
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    )
    return Sample(model), (torch.randn(2, 3, 16, 16), torch.tensor([3, 7]))


def _conditioned() -> Built:
    model = imported("diffusers").UNet2DConditionModel(
        sample_size=16,
        in_channels=4,
        out_channels=4,
        layers_per_block=1,
        block_out_channels=(16, 32),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        norm_num_groups=4,
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=24,
        attention_head_dim=4,
    )
    return Sample(model), (torch.randn(2, 4, 16, 16), torch.tensor([3, 7]), torch.randn(2, 6, 24))


def _dit() -> Built:
    model = imported("diffusers").DiTTransformer2DModel(
        num_attention_heads=4,
        attention_head_dim=8,
        in_channels=4,
        out_channels=8,
        num_layers=2,
        sample_size=8,
        patch_size=2,
        num_embeds_ada_norm=10,
        norm_num_groups=4,
    )
    return Sample(model), (torch.randn(2, 4, 8, 8), torch.tensor([3, 7]), torch.tensor([1, 4]))


def _vae() -> Built:
    model = imported("diffusers").AutoencoderKL(
        block_out_channels=(8, 16),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=4,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        sample_size=16,
    )
    return Sample(model), (torch.randn(2, 3, 16, 16),)


DETECTION.add("UNet2D", _unet2d)
DETECTION.add("UNet2D with text", _conditioned)
DETECTION.add("DiT", _dit)
DETECTION.add("Autoencoder (VAE)", _vae)


DETECTION.hf(
    "Swin2SR",
    "Swin2SRForImageSuperResolution",
    "Swin2SRConfig",
    {
        "image_size": 16,
        "embed_dim": 16,
        "depths": [1, 1],
        "num_heads": [2, 2],
        "window_size": 4,
        "mlp_ratio": 2.0,
    },
    image(16),
)
