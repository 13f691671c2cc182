_base_ = [
    "../_base_/models/bisenetv2.py",
    "../_base_/datasets/camvid.py",
    "../_base_/default_runtime.py",
]
custom_imports = dict(imports=["ohem_mm", "ohem_mm.datasets"], allow_failed_imports=False)
randomness = dict(seed=0)
model = dict(
    data_preprocessor=dict(size=(360, 480)),
    decode_head=dict(num_classes=11),
    auxiliary_head=[dict(head, num_classes=11) for head in _base_.model.auxiliary_head],
)

# From scratch.
optim_wrapper = dict(
    type="OptimWrapper",
    optimizer=dict(type="SGD", lr=0.05, momentum=0.9, weight_decay=0.0005),
)
param_scheduler = [
    dict(type="LinearLR", start_factor=0.1, by_epoch=False, begin=0, end=200),
    dict(type="PolyLR", power=0.9, eta_min=1e-4, by_epoch=False, begin=200, end=2000),
]
train_cfg = dict(type="IterBasedTrainLoop", max_iters=2000, val_interval=1000)
val_cfg = dict(type="ValLoop")
test_cfg = dict(type="TestLoop")
train_dataloader = dict(batch_size=16)
default_hooks = dict(checkpoint=dict(interval=500, max_keep_ckpts=2))
