_base_ = [
    "../_base_/models/efficientnet-lite0-frozen_segformer-head.py",
    "../_base_/datasets/camvid_whole-240x320.py",
    "../_base_/default_runtime.py",
]
custom_imports = dict(
    imports=["ohem_mm", "ohem_mm.datasets", "ohem_mm.frozen"], allow_failed_imports=False
)
randomness = dict(seed=0)
model = dict(data_preprocessor=dict(size=(240, 320)))

optim_wrapper = dict(
    type="OptimWrapper",
    optimizer=dict(type="AdamW", lr=2e-3, weight_decay=0.01),
)
param_scheduler = [
    dict(type="LinearLR", start_factor=0.1, by_epoch=False, begin=0, end=50),
    dict(type="PolyLR", power=0.9, eta_min=0, by_epoch=False, begin=50, end=1000),
]
train_cfg = dict(type="IterBasedTrainLoop", max_iters=1000, val_interval=1000)
val_cfg = dict(type="ValLoop")
test_cfg = dict(type="TestLoop")
default_hooks = dict(checkpoint=dict(interval=250, max_keep_ckpts=1))
