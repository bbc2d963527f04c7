//! What this host can do, and the files of its VMs.
