//! The program that the guest's kernel asks for modules it needs by itself (`/proc/sys/kernel/modprobe`, admin-guide/sysctl/kernel.rst): a
//! file system that is to be mounted, a kind of network device, a table of rules. With it, images need no `modprobe` of their own.
//!
//! Modules lie as their distribution packs them, beside the lists of depmod(8).

use std::collections::{BTreeMap, HashSet};
use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use rustix::io::Errno;

/// By this the kernel finds this program, whatever the guest's root has: it is the first process's.
pub(crate) const HELPER: &str = "/proc/1/exe";
/// `MODULE_INIT_COMPRESSED_FILE` (linux/module.h, since Linux 5.17): the kernel unpacks it.
const COMPRESSED_FILE: i32 = 4;

/// Runs as the kernel asks: `-q -- NAME`. None: it was something else that was asked.
pub(crate) fn asked(args: &[std::ffi::OsString]) -> Option<ExitCode> {
    let [quiet, dashes, name] = args else {
        return None;
    };
    if quiet != "-q" || dashes != "--" {
        return None;
    }
    let release = rustix::system::uname();
    let root = Path::new("/lib/modules").join(&*release.release().to_string_lossy());
    Some(match load(&root, &name.to_string_lossy()) {
        Ok(()) => ExitCode::SUCCESS,
        // The kernel's log is where it is looked for; nobody reads what this says.
        Err(_) => ExitCode::FAILURE,
    })
}

/// Dashes and underscores are the same.
fn plain(name: &str) -> String {
    name.replace('-', "_")
}

fn name_of(file: &str) -> String {
    let last = file.rsplit('/').next().unwrap_or(file);
    plain(last.split(".ko").next().unwrap_or(last))
}

/// What is to be loaded for this name or alias, each after what it needs.
fn order(root: &Path, wanted: &str) -> Vec<PathBuf> {
    let read = |name: &str| fs::read_to_string(root.join(name)).unwrap_or_default();
    let (dep, soft) = (read("modules.dep"), read("modules.softdep"));
    let files: BTreeMap<_, _> = dep
        .lines()
        .filter_map(|line| line.split_once(':'))
        .map(|(file, needs)| (name_of(file), (file, needs)))
        .collect();
    let mut names = vec![plain(wanted)];
    if !files.contains_key(&names[0]) {
        let aliases = read("modules.alias");
        names = aliases
            .lines()
            .filter_map(|line| line.strip_prefix("alias ")?.rsplit_once(' '))
            .filter(|(pattern, _)| fits(plain(pattern).as_bytes(), plain(wanted).as_bytes()))
            .map(|(_, module)| plain(module))
            .collect();
    }
    let before = |name: &str| -> Vec<String> {
        let words = soft.lines().find_map(|line| {
            let (module, words) = line.strip_prefix("softdep ")?.split_once(' ')?;
            (plain(module) == name).then_some(words)
        });
        let words = words.unwrap_or_default();
        let words = words.strip_prefix("pre:").unwrap_or_default();
        words
            .split_whitespace()
            .take_while(|w| *w != "post:")
            .map(plain)
            .collect()
    };
    let mut seen = HashSet::new();
    let mut all = Vec::new();
    // Whether it was looked at, and its name. A name is looked at once, so that this ends whatever the lists say.
    let mut left: Vec<(bool, String)> = names.into_iter().rev().map(|n| (false, n)).collect();
    while let Some((looked_at, name)) = left.pop() {
        let Some((file, needs)) = files.get(&name) else {
            continue;
        };
        if looked_at {
            all.push(root.join(file));
        } else if seen.insert(name.clone()) {
            left.push((true, name.clone()));
            // The last of the line is needed first.
            left.extend(needs.split_whitespace().map(|need| (false, name_of(need))));
            left.extend(before(&name).into_iter().map(|need| (false, need)));
        }
    }
    all
}

fn load(root: &Path, wanted: &str) -> io::Result<()> {
    let order = order(root, wanted);
    let mut loaded = Err(io::ErrorKind::NotFound.into());
    for path in order {
        let file = File::open(&path)?;
        let flags = match path.extension() {
            Some(end) if end == "ko" => 0,
            _ => COMPRESSED_FILE,
        };
        loaded = match rustix::system::finit_module(&file, c"", flags) {
            Ok(()) | Err(Errno::EXIST) => Ok(()),
            Err(e) => Err(e.into()),
        };
    }
    loaded
}

/// Whether a text fits a pattern of fnmatch(3), as far as lists of aliases have them: `*`, `?` and `[...]`.
fn fits(pattern: &[u8], text: &[u8]) -> bool {
    match (pattern.first(), text.first()) {
        (None, None) => true,
        (Some(b'*'), _) => {
            fits(&pattern[1..], text) || (!text.is_empty() && fits(pattern, &text[1..]))
        }
        (Some(b'?'), Some(_)) => fits(&pattern[1..], &text[1..]),
        (Some(b'['), Some(c)) => {
            let Some(end) = pattern.iter().position(|b| *b == b']') else {
                return false;
            };
            let set = &pattern[1..end];
            let within = set
                .windows(3)
                .any(|w| w[1] == b'_' && w[0] <= *c && *c <= w[2])
                || set.contains(c);
            within && fits(&pattern[end + 1..], &text[1..])
        }
        (Some(p), Some(c)) => p == c && fits(&pattern[1..], &text[1..]),
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn patterns_fit_as_fnmatch_has_them() {
        for (pattern, text, so) in [
            ("fs-overlay", "fs-overlay", true),
            ("fs-overlay", "fs-over", false),
            ("net-pf-16-proto-*", "net-pf-16-proto-12", true),
            (
                "cpu:type:x86,ven*fam*mod*",
                "cpu:type:x86,ven0fam6mod1",
                true,
            ),
            ("usb:v*d0[0-3]?c", "usb:v12d02xc", true),
            ("usb:v*d0[0-3]?c", "usb:v12d05xc", false),
        ] {
            let (p, t) = (plain(pattern), plain(text));
            assert_eq!(fits(p.as_bytes(), t.as_bytes()), so, "{pattern} {text}");
        }
    }

    #[test]
    fn each_after_what_it_needs() {
        let dir = tempfile::tempdir().unwrap();
        let write = |name: &str, text: &str| fs::write(dir.path().join(name), text).unwrap();
        write(
            "modules.dep",
            "k/nf_nat.ko.xz: k/nf_conntrack.ko.xz k/libcrc32c.ko.xz\nk/nf_conntrack.ko.xz: k/libcrc32c.ko.xz\n\
             k/libcrc32c.ko.xz:\nk/crc32c-intel.ko.xz:\nk/xt_MASQUERADE.ko.xz: k/nf_nat.ko.xz k/nf_conntrack.ko.xz k/libcrc32c.ko.xz\n\
             k/round.ko: k/about.ko\nk/about.ko: k/round.ko\n",
        );
        write("modules.alias", "alias ipt_MASQUERADE xt_MASQUERADE\n");
        write("modules.softdep", "softdep libcrc32c pre: crc32c-intel\n");
        let names = |wanted: &str| -> Vec<String> {
            let order = order(dir.path(), wanted);
            order
                .iter()
                .map(|p| name_of(&p.to_string_lossy()))
                .collect()
        };
        assert_eq!(
            names("ipt_MASQUERADE"),
            [
                "crc32c_intel",
                "libcrc32c",
                "nf_conntrack",
                "nf_nat",
                "xt_MASQUERADE"
            ]
        );
        assert_eq!(names("round").len(), 2);
        assert!(names("nothing").is_empty());
    }
}
