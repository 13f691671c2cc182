_base_ = [
    "../_base_/models/efficientnet-lite0-frozen_segformer-head.py",
    "../_base_/datasets/camvid_whole-240x320.py",
    "../_base_/schedules/schedule_1k_adamw.py",
    "../_base_/default_runtime.py",
]
custom_imports = dict(
    imports=["ohem_mm", "ohem_mm.datasets", "ohem_mm.frozen"], allow_failed_imports=False
)
randomness = dict(seed=0)
model = dict(data_preprocessor=dict(size=(240, 320)))

optim_wrapper = dict(optimizer=dict(lr=2e-3))
default_hooks = dict(checkpoint=dict(interval=250, max_keep_ckpts=1))
