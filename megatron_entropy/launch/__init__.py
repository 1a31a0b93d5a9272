"""From a configuration file to running ranks: checks, the run folder, torchrun, and reports of failures."""
