"""The order of steps of the scripts: settings, data, training, evaluation, report, publishing; needs `hf_ls[scripts]`."""

from hf_ls.common.errors import need_scripts

need_scripts()
