"""Entry points, installed as titanfunc.scripts. The only place that imports hydra."""
