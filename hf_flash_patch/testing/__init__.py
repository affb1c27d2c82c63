"""What tests compare with: a dense specification, and the only source of tolerances."""
