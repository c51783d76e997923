"""Small random models of torchvision and timm, by their own classes."""

from functools import partial
from typing import Any

from torch import nn

from tests.zoo.model import CLASSES, Model, images, zoo


def narrow(model: nn.Module, times: int) -> nn.Module:
    """The same network with fewer channels, for classes that do not take the number of them."""
    for parent in [*model.modules()]:
        for name, layer in parent.named_children():
            if isinstance(layer, nn.Conv2d):
                into = layer.in_channels // times if layer.in_channels > 3 else layer.in_channels
                options: dict[str, Any] = {
                    k: getattr(layer, k) for k in ("kernel_size", "stride", "padding")
                }
                out = layer.out_channels // times
                options["groups"] = max(layer.groups // times, 1)
                setattr(parent, name, nn.Conv2d(into, out, bias=layer.bias is not None, **options))
            elif isinstance(layer, nn.BatchNorm2d):
                setattr(parent, name, nn.BatchNorm2d(layer.num_features // times))
            elif isinstance(layer, nn.Linear):
                setattr(parent, name, nn.Linear(layer.in_features // times, layer.out_features))
    return model


# -------------------------------------------------------------------------------------- torchvision
@zoo("torchvision resnet18", "torchvision")
def resnet18() -> Model:
    import torchvision

    return images(narrow(torchvision.models.resnet18(num_classes=CLASSES), 8))


@zoo("torchvision mobilenet_v2", "torchvision")
def mobilenet_v2() -> Model:
    import torchvision

    blocks = [[1, 64, 1, 1], [4, 96, 2, 2], [4, 128, 1, 2]]
    model = torchvision.models.MobileNetV2(CLASSES, inverted_residual_setting=blocks)
    return images(narrow(model, 8))


@zoo("torchvision mobilenet_v3", "torchvision")
def mobilenet_v3() -> Model:
    from torchvision.models.mobilenetv3 import InvertedResidualConfig, MobileNetV3

    block = partial(InvertedResidualConfig, dilation=1, width_mult=1.0)
    blocks = [
        block(8, 3, 8, 8, True, "RE", 2),
        block(8, 3, 24, 12, False, "HS", 2),
        block(12, 5, 24, 12, True, "HS", 1),
    ]
    return images(MobileNetV3(blocks, last_channel=32, num_classes=CLASSES))


@zoo("torchvision efficientnet", "torchvision")
def efficientnet() -> Model:
    from torchvision.models.efficientnet import EfficientNet, MBConvConfig

    blocks = [MBConvConfig(1, 3, 1, 8, 8, 1), MBConvConfig(4, 3, 2, 8, 12, 2)]
    return images(EfficientNet(blocks, dropout=0.2, last_channel=32, num_classes=CLASSES))


@zoo("torchvision vit", "torchvision")
def vit() -> Model:
    import torchvision

    return images(
        torchvision.models.VisionTransformer(
            image_size=16,
            patch_size=4,
            num_layers=2,
            num_heads=2,
            hidden_dim=16,
            mlp_dim=24,
            num_classes=CLASSES,
        ),
        16,
    )


@zoo("torchvision swin", "torchvision")
def swin() -> Model:
    import torchvision

    return images(
        torchvision.models.SwinTransformer(
            [4, 4], 8, [2, 2], [2, 2], [4, 4], stochastic_depth_prob=0.2, num_classes=CLASSES
        )
    )


@zoo("torchvision convnext", "torchvision")
def convnext() -> Model:
    from torchvision.models.convnext import CNBlockConfig, ConvNeXt

    blocks = [CNBlockConfig(8, 16, 1), CNBlockConfig(16, None, 2)]
    return images(ConvNeXt(blocks, stochastic_depth_prob=0.2, num_classes=CLASSES))


# --------------------------------------------------------------------------------------------- timm
def _timm(name: str, diagonal: tuple[str, ...] = (), **options: Any) -> Model:
    import timm

    return images(timm.create_model(name, num_classes=CLASSES, **options), diagonal=diagonal)


TIMM: dict[str, tuple[str, dict[str, Any]]] = {
    "resnet18": ("resnet18", {"channels": (8, 12, 16, 24), "stem_width": 8}),
    "vit": (
        "vit_tiny_patch16_224",
        {"img_size": 32, "patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 2},
    ),
    "vit, layer scale": (
        "deit3_small_patch16_224",
        {
            "img_size": 32,
            "patch_size": 8,
            "embed_dim": 16,
            "depth": 2,
            "num_heads": 2,
            "drop_path_rate": 0.2,
        },
    ),
    "swin": (
        "swin_tiny_patch4_window7_224",
        {
            "img_size": 32,
            "window_size": 4,
            "embed_dim": 8,
            "depths": (2, 2),
            "num_heads": (2, 2),
        },
    ),
    "convnext": (
        "convnext_atto",
        {"dims": (8, 12, 16, 24), "depths": (1, 1, 1, 1), "drop_path_rate": 0.2},
    ),
}
for _name, (_model, _options) in TIMM.items():
    zoo(f"timm {_name}", "timm")(lambda m=_model, o=_options: _timm(m, **o))


@zoo("timm mixer", "timm")
def mixer() -> Model:
    from timm.models.mlp_mixer import MlpMixer

    return images(
        MlpMixer(num_classes=CLASSES, img_size=32, patch_size=8, num_blocks=2, embed_dim=16)
    )


def _blocks(*stages: str) -> list:
    """Stages in the notation of timm: r repeats, k kernel, s stride, e expansion, c width."""
    from timm.models._efficientnet_builder import decode_arch_def

    return decode_arch_def([[stage] for stage in stages])


@zoo("timm mobilenet_v2", "timm")
def timm_mobilenet_v2() -> Model:
    from timm.models.efficientnet import EfficientNet

    blocks = _blocks("ds_r1_k3_s1_c8", "ir_r2_k3_s2_e4_c12")
    return images(EfficientNet(blocks, CLASSES, num_features=32, stem_size=8, act_layer=nn.ReLU6))


@zoo("timm mobilenet_v3", "timm")
def timm_mobilenet_v3() -> Model:
    from timm.models.mobilenetv3 import MobileNetV3

    blocks = _blocks("ds_r1_k3_s2_e1_c8_se0.25_nre", "ir_r2_k5_s2_e3_c12_se0.25", "cn_r1_k1_s1_c24")
    return images(
        MobileNetV3(blocks, CLASSES, num_features=32, stem_size=8, act_layer=nn.Hardswish)
    )


@zoo("timm efficientnet", "timm")
def timm_efficientnet() -> Model:
    from timm.models.efficientnet import EfficientNet

    blocks = _blocks("ds_r1_k3_s1_e1_c8_se0.25", "ir_r2_k5_s2_e4_c12_se0.25")
    return images(
        EfficientNet(
            blocks,
            CLASSES,
            num_features=32,
            stem_size=8,
            act_layer=nn.SiLU,
            drop_rate=0.2,
            drop_path_rate=0.2,
        )
    )
