//! Filters of the user's own, which only take rights away: what Firecracker's `--seccomp-filter` names.
//!
//! Such a file is written by Firecracker's `seccompiler-bin`: a map from a thread's name (`vmm`, `api`, `vcpu`) to a BPF program of
//! 64-bit instructions (`struct sock_filter` of `linux/filter.h`). Up to Firecracker 1.14 it is bincode with fixed integers (all little
//! endian, a length is 64 bits), from 1.15 on bitcode 0.6.
//!
//! A filter of the user's comes first and that of the thread's role on top of it; of all answers the kernel takes the strictest.
//!
//! Deliberately does not know: where the file is, what a program decides.

use std::fmt;
use std::sync::OnceLock;

use libc::sock_filter;
use serde::de::{Deserialize, Deserializer, MapAccess, Visitor};

use crate::{Role, compose};

/// Most bytes of such a file; Firecracker's limit.
pub const MAX_EXTRA_FILTERS_BYTES: usize = 100_000;
/// Longest program: what the kernel takes, less what stands before it here.
pub const MAX_EXTRA_INSTRUCTIONS: usize = compose::MAX_INSTRUCTIONS - compose::PASS_SECCOMP.len();
/// Names of threads that a file may have; there are three. A hostile one has thousands, each with its line in the error.
const MAX_NAMES: usize = 8;
/// Characters of a thread's name that an error shows.
const SHOWN_CHARS: usize = 40;

/// Firecracker's names of threads, and which roles do here what that thread does there.
const THREADS: [(&str, &[Role]); 3] = [
    (
        "vmm",
        &[Role::Control, Role::Devices, Role::Files, Role::Pages],
    ),
    ("api", &[Role::Api]),
    ("vcpu", &[Role::Vcpu]),
];

static EXTRA: OnceLock<ExtraFilters> = OnceLock::new();

/// One program for each of `vmm`, `api` and `vcpu`, ready to be installed.
#[derive(Clone)]
pub struct ExtraFilters([Vec<sock_filter>; THREADS.len()]);

/// Why a file with filters cannot be used. Each is a sentence about the file, without its name.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum ExtraFiltersError {
    /// Nothing is in it.
    #[error("the file is empty; give what seccompiler-bin has written")]
    Empty,
    /// It is longer than Firecracker takes.
    #[error(
        "the file has more than {MAX_EXTRA_FILTERS_BYTES} bytes, which is the limit; is this the right file?"
    )]
    TooLarge,
    /// It ends too early.
    #[error(
        "the file ends within {what}: {wanted} more bytes should follow at byte {at}, and {left} do; is the file complete?"
    )]
    Truncated {
        /// The part that is not all there.
        what: &'static str,
        /// Where the part begins.
        at: usize,
        /// Bytes that it says it has.
        wanted: u64,
        /// Bytes that there are.
        left: usize,
    },
    /// It goes on.
    #[error("{0} bytes follow the last filter; compile the file anew with seccompiler-bin")]
    Leftover(usize),
    /// It is something else.
    #[error(
        "the file is nothing that seccompiler-bin has written ({0}); compile the rules with it first"
    )]
    NotFilters(String),
    /// It can be read, and is wrong: everything that is.
    #[error("{}", .0.join("; "))]
    Wrong(Vec<String>),
    /// They count for threads that start after them.
    #[error("there are extra filters already; they are set once, in main")]
    SetTwice,
}

impl ExtraFilters {
    /// Reads a file of `seccompiler-bin`, of either form. Names of threads are read without regard to case, as Firecracker does.
    ///
    /// # Errors
    /// It is no such file, or threads or instructions are missing or too many: all of them.
    pub fn from_bytes(bytes: &[u8]) -> Result<Self, ExtraFiltersError> {
        if bytes.is_empty() {
            return Err(ExtraFiltersError::Empty);
        }
        if bytes.len() > MAX_EXTRA_FILTERS_BYTES {
            return Err(ExtraFiltersError::TooLarge);
        }
        let programs = match starts_as_fixed(bytes) {
            Some(count) => fixed(bytes, count)?,
            None => {
                let Programs(programs) = bitcode::deserialize(bytes)
                    .map_err(|e| ExtraFiltersError::NotFilters(e.to_string()))?;
                programs
            }
        };
        Self::of(programs)
    }

    /// The three programs, of which each may be there once.
    fn of(programs: Vec<(String, Vec<u64>)>) -> Result<Self, ExtraFiltersError> {
        let mut found: [Option<Vec<sock_filter>>; THREADS.len()] = Default::default();
        let mut wrong = Vec::new();
        for (name, program) in programs {
            let name = name.to_lowercase();
            let place = THREADS.iter().position(|(known, _)| *known == name);
            let shown: String = name.chars().take(SHOWN_CHARS).collect();
            let Some(place) = place.and_then(|at| found.get_mut(at)) else {
                wrong.push(format!(
                    "there is no thread {shown:?}: the threads are vmm, api and vcpu; take its filter out"
                ));
                continue;
            };
            match program.len() {
                _ if place.is_some() => {
                    wrong.push(format!("thread {shown:?} has two filters; leave one"));
                }
                0 => wrong.push(format!(
                    "the filter of thread {shown:?} has no instruction, so that nobody knows what it refuses; \
                     to take nothing away write one whose default_action is allow"
                )),
                len if len > MAX_EXTRA_INSTRUCTIONS => wrong.push(format!(
                    "the filter of thread {shown:?} has {len} instructions, the limit is {MAX_EXTRA_INSTRUCTIONS}; \
                     take rules out"
                )),
                _ => {}
            }
            *place = Some(compose::after_seccomp(program.into_iter().map(instruction)));
        }
        for ((name, _), program) in THREADS.iter().zip(&found) {
            if program.is_none() {
                wrong.push(format!(
                    "there is no filter for thread {name:?}; write one for each of vmm, api and vcpu"
                ));
            }
        }
        if wrong.is_empty() {
            return Ok(Self(found.map(Option::unwrap_or_default)));
        }
        Err(ExtraFiltersError::Wrong(wrong))
    }

    /// Asks the kernel whether it takes these programs, without confining anybody.
    ///
    /// # Errors
    /// Those that it does not take, and why.
    fn check(&self) -> Result<(), ExtraFiltersError> {
        let mut wrong = Vec::new();
        for ((name, _), program) in THREADS.iter().zip(&self.0) {
            // The kernel checks all instructions, whether or not one is ever reached: behind one that allows everything nothing is
            // refused to the thread, which then ends.
            let mut harmless = program.clone();
            if let Some(first) = harmless.first_mut() {
                *first = compose::ALLOW;
            }
            let install =
                move || compose::forbid_new_rights().and_then(|()| compose::install(&harmless));
            let done = std::thread::spawn(install).join();
            if let Ok(Err((call, e))) = done {
                wrong.push(format!(
                    "the kernel does not take the filter of thread {name:?}: {call}: {e}; its instructions are no \
                     valid seccomp program: compile it anew with seccompiler-bin"
                ));
            }
        }
        if wrong.is_empty() {
            return Ok(());
        }
        Err(ExtraFiltersError::Wrong(wrong))
    }

    fn of_role(&self, role: Role) -> &[sock_filter] {
        let at = THREADS.iter().position(|(_, roles)| roles.contains(&role));
        at.and_then(|at| self.0.get(at)).map_or(&[], Vec::as_slice)
    }
}

impl fmt::Debug for ExtraFilters {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let lengths = THREADS.iter().zip(&self.0);
        f.debug_map()
            .entries(lengths.map(|((name, _), program)| (name, program.len())))
            .finish()
    }
}

/// From now on each thread that enters a role is confined by `filters` as well. To be called once, in main, before the first does.
///
/// # Errors
/// The kernel does not take one of them, or some are set already.
pub fn set_extra_filters(filters: ExtraFilters) -> Result<(), ExtraFiltersError> {
    filters.check()?;
    EXTRA.set(filters).map_err(|_| ExtraFiltersError::SetTwice)
}

/// What the user has for `role`: nothing, or a program that lets `seccomp` through, for the filter that comes on top.
pub(crate) fn of_role(role: Role) -> Option<&'static [sock_filter]> {
    EXTRA.get().map(|filters| filters.of_role(role))
}

/// Whether the user has filters. Async-signal-safe.
pub(crate) fn are_set() -> bool {
    EXTRA.get().is_some()
}

/// `struct sock_filter`, as it lies in memory: code, jt, jf, k.
fn instruction(word: u64) -> sock_filter {
    let [c0, c1, jt, jf, k0, k1, k2, k3] = word.to_le_bytes();
    sock_filter {
        code: u16::from_le_bytes([c0, c1]),
        jt,
        jf,
        k: u32::from_le_bytes([k0, k1, k2, k3]),
    }
}

// ---- the form with fixed integers ----

/// How many programs there are, if it begins as the form with fixed integers does: bitcode has no seven zeroes there.
fn starts_as_fixed(bytes: &[u8]) -> Option<u64> {
    let (count, _) = bytes.split_first_chunk::<8>()?;
    let count = u64::from_le_bytes(*count);
    (count <= u64::from(u8::MAX)).then_some(count)
}

/// `count` times a name and a program, each behind its length.
fn fixed(bytes: &[u8], count: u64) -> Result<Vec<(String, Vec<u64>)>, ExtraFiltersError> {
    let mut rest = Rest { bytes, at: 8 };
    let mut programs = Vec::new();
    for _ in 0..count {
        if programs.len() == MAX_NAMES {
            return Err(too_many_names());
        }
        let name = rest.counted("the name of a thread", 1)?;
        let name = std::str::from_utf8(name)
            .map_err(|_| ExtraFiltersError::NotFilters("the name of a thread is no text".into()))?
            .to_owned();
        let (words, _) = rest.counted("a filter", 8)?.as_chunks::<8>();
        programs.push((
            name,
            words.iter().copied().map(u64::from_le_bytes).collect(),
        ));
    }
    match bytes.len() - rest.at {
        0 => Ok(programs),
        left => Err(ExtraFiltersError::Leftover(left)),
    }
}

fn too_many_names() -> ExtraFiltersError {
    ExtraFiltersError::NotFilters(format!("it has filters for more than {MAX_NAMES} threads"))
}

/// What is not read yet.
struct Rest<'a> {
    bytes: &'a [u8],
    at: usize,
}

impl<'a> Rest<'a> {
    /// What lies behind a length, which counts things of `size` bytes.
    fn counted(&mut self, what: &'static str, size: u64) -> Result<&'a [u8], ExtraFiltersError> {
        let length = self.take("a length", 8)?;
        let length = length.first_chunk().map_or(0, |n| u64::from_le_bytes(*n));
        self.take(what, length.saturating_mul(size))
    }

    fn take(&mut self, what: &'static str, wanted: u64) -> Result<&'a [u8], ExtraFiltersError> {
        let left = self.bytes.get(self.at..).unwrap_or_default();
        let taken = usize::try_from(wanted).ok().and_then(|n| left.get(..n));
        let Some(taken) = taken else {
            return Err(ExtraFiltersError::Truncated {
                what,
                at: self.at,
                wanted,
                left: left.len(),
            });
        };
        self.at += taken.len();
        Ok(taken)
    }
}

// ---- bitcode ----

/// The entries of the map, twice the same name and all. A program is bounded by the file: no packing of bitcode makes more than eight
/// instructions of a byte.
struct Programs(Vec<(String, Vec<u64>)>);

impl<'de> Deserialize<'de> for Programs {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Entries;
        impl<'de> Visitor<'de> for Entries {
            type Value = Programs;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a map from threads to filters")
            }
            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
                let mut programs = Vec::new();
                while let Some(entry) = map.next_entry()? {
                    if programs.len() == MAX_NAMES {
                        return Err(serde::de::Error::custom(too_many_names()));
                    }
                    programs.push(entry);
                }
                Ok(Programs(programs))
            }
        }
        deserializer.deserialize_map(Entries)
    }
}

#[cfg(test)]
mod tests;
