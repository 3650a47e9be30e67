"""Where an artifact runs and is measured: this machine now; ssh, adb and device profiles have their place here."""
