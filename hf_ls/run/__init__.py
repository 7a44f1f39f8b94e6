"""One run of the scripts, in order: settings, data and model, training, calibration, report, publication."""
