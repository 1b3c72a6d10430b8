"""Remember plans: under which key, in memory for one target, and on disk for later processes."""
