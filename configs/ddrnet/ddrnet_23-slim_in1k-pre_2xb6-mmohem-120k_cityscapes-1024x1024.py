_base_ = "./ddrnet_23-slim_in1k-pre_2xb6-120k_cityscapes-1024x1024.py"
# Both places take mmseg's own OhemCrossEntropy, as in mmseg's config. There is no
# -sampler twin: DDRHead never calls a pixel sampler, so one would change nothing. And this loss
# works in PIDHead and DDRHead alone: other heads hand it arguments that it does not take.
# min_kept: pixels of the batch on one GPU (131072 of 6 x 1024 x 1024).
class_weight = _base_.model.decode_head.loss_decode[0].class_weight
ohem = dict(type="OhemCrossEntropy", thres=0.9, min_kept=131072, class_weight=class_weight)
model = dict(
    decode_head=dict(
        loss_decode=[dict(ohem, loss_weight=1.0), dict(ohem, loss_weight=0.4)],
    ),
)
del ohem
