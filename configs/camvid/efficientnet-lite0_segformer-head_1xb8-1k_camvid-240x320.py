_base_ = [
    "../_base_/models/efficientnet-lite0_segformer-head.py",
    "../_base_/datasets/camvid_240x320.py",
    "../_base_/default_runtime.py",
]
custom_imports = dict(imports=["ohem_mm", "ohem_mm.datasets"], allow_failed_imports=False)
randomness = dict(seed=0)
model = dict(data_preprocessor=dict(size=(240, 320)))

optim_wrapper = dict(
    type="OptimWrapper",
    optimizer=dict(type="AdamW", lr=1e-3, weight_decay=0.01),
    # The backbone comes trained, the head does not.
    paramwise_cfg=dict(custom_keys=dict(backbone=dict(lr_mult=0.3))),
)
param_scheduler = [
    dict(type="LinearLR", start_factor=0.1, by_epoch=False, begin=0, end=50),
    dict(type="PolyLR", power=0.9, eta_min=0, by_epoch=False, begin=50, end=1000),
]
train_cfg = dict(type="IterBasedTrainLoop", max_iters=1000, val_interval=1000)
val_cfg = dict(type="ValLoop")
test_cfg = dict(type="TestLoop")
default_hooks = dict(checkpoint=dict(interval=100, max_keep_ckpts=2))
