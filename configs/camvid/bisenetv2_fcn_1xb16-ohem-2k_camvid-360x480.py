_base_ = "./bisenetv2_fcn_1xb16-2k_camvid-360x480.py"
# mmengine replaces a list whole, so the list is rebuilt from the base's heads.
# min_kept: 1/16 of the valid pixels of the batch, whatever the crop and the batch size.
ohem = dict(type="OhemCrossEntropyLoss", thresh=0.7, min_kept=1 / 16)
model = dict(
    decode_head=dict(loss_decode=ohem),
    auxiliary_head=[
        dict(head, loss_decode=dict(head.loss_decode, **ohem))
        for head in _base_.model.auxiliary_head
    ],
)
del ohem
# The heads hand their small logits to the loss: same numbers, less time and memory.
custom_hooks = [dict(type="FusedOhemHook")]
