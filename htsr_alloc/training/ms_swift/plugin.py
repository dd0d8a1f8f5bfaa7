"""The file for ms-swift's ``external_plugins``."""

from htsr_alloc.training.ms_swift import register

register()
