import torch
from hypothesis import HealthCheck, settings

# One thread each: tests are small, and two cores run faster without contention.
torch.set_num_threads(1)
settings.register_profile(
    "ohem_mm",
    deadline=None,
    derandomize=True,
    print_blob=True,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("ohem_mm")
