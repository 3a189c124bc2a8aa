"""Speed, side by side: the modes of one model, its dense twin, later peers, interleaved in one run."""
