# EfficientNet-Lite0 (timm's) with SegFormer's all-MLP head on strides 4, 8, 16 and 32: 3.5 M
# parameters, and thin objects keep their stride-4 features.
norm_cfg = dict(type="SyncBN", requires_grad=True)
model = dict(
    type="EncoderDecoder",
    # The normalisation that its ImageNet weights were trained with.
    data_preprocessor=dict(
        type="SegDataPreProcessor",
        mean=[127.0, 127.0, 127.0],
        std=[128.0, 128.0, 128.0],
        bgr_to_rgb=True,
        pad_val=0,
        seg_pad_val=255,
    ),
    backbone=dict(
        type="TIMMBackbone",
        model_name="tf_efficientnet_lite0",
        features_only=True,
        pretrained=False,
        # Written by tools/model_converters/efficientnet_lite0.py.
        init_cfg=dict(type="Pretrained", checkpoint="pretrain/tf_efficientnet_lite0.pth"),
    ),
    decode_head=dict(
        type="SegformerHead",
        in_channels=[24, 40, 112, 320],
        in_index=[1, 2, 3, 4],
        channels=64,
        dropout_ratio=0.1,
        num_classes=11,
        norm_cfg=norm_cfg,
        align_corners=False,
        loss_decode=dict(type="CrossEntropyLoss", use_sigmoid=False, loss_weight=1.0),
    ),
    train_cfg=dict(),
    test_cfg=dict(mode="whole"),
)
