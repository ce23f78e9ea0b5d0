"""No timing is asserted: the first call of an operator is slow on any machine."""

from hypothesis import settings

settings.register_profile("untimed", deadline=None)
settings.load_profile("untimed")
