_base_ = "./stdc1_in1k-pre_4xb12-80k_cityscapes-512x1024.py"
custom_imports = dict(imports=["ohem_mm"], allow_failed_imports=False)
# mmengine replaces a list whole, so the list is rebuilt from the base's heads; each keeps its own
# loss_weight.
# The third, STDCHead, learns boundaries and keeps its own two losses.
# min_kept: 1/16 of the valid pixels of the batch, whatever the crop and the batch size.
ohem = dict(type="OhemCrossEntropyLoss", thresh=0.7, min_kept=1 / 16)
model = dict(
    decode_head=dict(loss_decode=ohem),
    auxiliary_head=[
        *[
            dict(head, loss_decode=dict(head.loss_decode, **ohem))
            for head in _base_.model.auxiliary_head[:2]
        ],
        *_base_.model.auxiliary_head[2:],
    ],
)
del ohem
# The heads hand their small logits to the loss: same numbers, less time and memory.
custom_hooks = [dict(type="FusedOhemHook")]
