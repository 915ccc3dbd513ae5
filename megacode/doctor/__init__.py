"""Would training here be right? Checks of the installation, the kernels, the layouts and the links; docs/doctor.md."""
