"""Where an artifact runs and is measured: this machine, a device over ssh or adb, or ARM emulated
here. Profiles describe devices that are not at hand, for estimates."""
