"""The devices on which artifacts run and are measured: this machine, ssh, Android over adb, emulated ARM; device profiles."""
