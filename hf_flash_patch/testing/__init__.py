"""What tests compare with, the only source of tolerances, and text for measurements."""
