"""What is asked for: specs, modulation, rules, presets. Frozen, validated, the same names in YAML."""
