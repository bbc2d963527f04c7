//! The compiled policies, made by `build/main.rs` from `resources/seccomp`.

use libc::sock_filter;

use crate::Role;

include!(concat!(env!("OUT_DIR"), "/filters.rs"));

/// What `device` adds for `role`, often nothing; `None` if no fragment has this name.
pub(crate) fn fragment(device: &str, role: Role) -> Option<&'static [sock_filter]> {
    let known = DEVICES.contains(&device);
    let own = FRAGMENTS.iter().find(|f| f.0 == device && f.1 == role);
    known.then(|| own.map_or(&[][..], |f| f.2))
}
