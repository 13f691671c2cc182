_base_ = [
    "../_base_/models/efficientnet-lite0_segformer-head.py",
    "../_base_/datasets/camvid_240x320.py",
    "../_base_/schedules/schedule_1k_adamw.py",
    "../_base_/default_runtime.py",
]
custom_imports = dict(imports=["ohem_mm", "ohem_mm.datasets"], allow_failed_imports=False)
randomness = dict(seed=0)
model = dict(data_preprocessor=dict(size=(240, 320)))

optim_wrapper = dict(
    optimizer=dict(lr=1e-3),
    # The backbone comes trained, the head does not.
    paramwise_cfg=dict(custom_keys=dict(backbone=dict(lr_mult=0.3))),
)
default_hooks = dict(checkpoint=dict(interval=100, max_keep_ckpts=2))
