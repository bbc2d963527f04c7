//! The command line: text to [`Args`], nothing else.

use std::collections::BTreeSet;
use std::ffi::OsString;
use std::os::fd::RawFd;
use std::path::PathBuf;

/// What `--help` prints.
pub(crate) const HELP: &str = "\
alveole-jailer: starts alveole-vmm in a jail

usage: alveole-jailer --id ID --exec-file FILE --uid UID --gid GID [options] [-- ARGUMENT...]

  --id ID                    name of the machine: 1 to 64 letters, digits and hyphens
  --exec-file FILE           the program to start; a copy of it goes into the jail
  --uid UID, --gid GID       whose rights it has
  --chroot-base-dir DIR      where jails lie (default: /srv/jailer); this one's root is
                             DIR/NAME-OF-FILE/ID/root
  --netns FILE               network namespace to join, such as /run/netns/NAME
  --new-pid-ns               start the program in a process namespace of its own
  --daemonize                start it in a session of its own, with /dev/null as its input and output
  --cgroup FILE=VALUE        write VALUE to FILE of the machine's own cgroup; can be repeated
  --cgroup-version 1|2       which hierarchies --cgroup is about (default: 1)
  --parent-cgroup PATH       below which its cgroup is made (default: name of the program)
  --resource-limit NAME=N    no-file: most descriptors, and one more than their largest number
                             (default: 2048); fsize: longest file it can write, in bytes
  --pass-fd N                let it have descriptor N, which this program was started with; can be
                             repeated. All others but 0, 1 and 2 are closed
  --version, --help

What follows -- is given to the program, behind --id, --start-time-us, --start-time-cpu-us and
--parent-cpu-time-us. Its process number is in NAME-OF-FILE.pid in the jail's root.

exit status: that of the program; with --daemonize or --new-pid-ns 0 when it has been started;
1 when it could not be started
";

/// Longest `--id`, as Firecracker has it.
const MAX_ID_CHARS: usize = 64;
/// What the kernel takes as the name of a file or cgroup (Linux `NAME_MAX`).
const MAX_NAME_BYTES: usize = 255;
/// Where jails lie unless said; Firecracker's default.
const DEFAULT_CHROOT_BASE: &str = "/srv/jailer";
/// Most descriptors unless said; Firecracker's default.
const DEFAULT_NO_FILE: u64 = 2048;

/// What the command line asks for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Args {
    pub(crate) id: String,
    pub(crate) exec_file: PathBuf,
    pub(crate) uid: u32,
    pub(crate) gid: u32,
    pub(crate) chroot_base: PathBuf,
    pub(crate) netns: Option<PathBuf>,
    pub(crate) new_pid_ns: bool,
    pub(crate) daemonize: bool,
    pub(crate) cgroups: Vec<CgroupSetting>,
    pub(crate) cgroup_version: CgroupVersion,
    pub(crate) parent_cgroup: Option<String>,
    pub(crate) limits: Limits,
    pub(crate) pass_fds: BTreeSet<RawFd>,
    pub(crate) program_args: Vec<OsString>,
}

/// A value for a file of the cgroup.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct CgroupSetting {
    pub(crate) file: String,
    pub(crate) value: String,
}

impl CgroupSetting {
    /// The controller that the file belongs to: what stands before its first dot.
    pub(crate) fn controller(&self) -> &str {
        self.file.split('.').next().unwrap_or_default()
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum CgroupVersion {
    V1,
    V2,
}

/// Limits of the process.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Limits {
    pub(crate) no_file: u64,
    pub(crate) file_size_bytes: Option<u64>,
}

/// What to do.
#[derive(Debug)]
pub(crate) enum Request {
    Run(Box<Args>),
    Help,
    Version,
}

/// Options as they stand on the command line.
#[derive(Debug, Default)]
struct Words {
    id: Option<String>,
    exec_file: Option<PathBuf>,
    uid: Option<u32>,
    gid: Option<u32>,
    chroot_base: Option<PathBuf>,
    netns: Option<PathBuf>,
    cgroup_version: Option<CgroupVersion>,
    parent_cgroup: Option<String>,
}

/// Reads the command line.
///
/// # Errors
/// A word that is not understood, or one that is missing: what it is and what is expected.
pub(crate) fn parse(words: impl IntoIterator<Item = OsString>) -> Result<Request, String> {
    use lexopt::Arg::{Long, Short, Value};
    let mut ours: Vec<OsString> = words.into_iter().collect();
    let mut program_args = Vec::new();
    if let Some(at) = ours.iter().position(|word| word == "--") {
        program_args = ours.split_off(at);
        program_args.remove(0);
    }
    let mut seen = Words::default();
    let mut new_pid_ns = false;
    let mut daemonize = false;
    let mut cgroups = Vec::new();
    let mut limits = Limits {
        no_file: DEFAULT_NO_FILE,
        file_size_bytes: None,
    };
    let mut pass_fds = BTreeSet::new();

    let mut parser = lexopt::Parser::from_args(ours);
    while let Some(word) = parser.next().map_err(|e| e.to_string())? {
        let name = match word {
            Short('h') => "help".into(),
            Short('V') => "version".into(),
            Long(name) => name.to_owned(),
            Short(other) => return Err(format!("unknown option -{other}")),
            Value(value) => {
                return Err(format!(
                    "unexpected word {value:?}: arguments of the program stand behind --"
                ));
            }
        };
        let mut value = || parser.value().map_err(|e| e.to_string());
        match name.as_str() {
            "help" => return Ok(Request::Help),
            "version" => return Ok(Request::Version),
            "new-pid-ns" => new_pid_ns = true,
            "daemonize" => daemonize = true,
            "id" => once(&mut seen.id, "id", id(text("id", value()?)?)?)?,
            "exec-file" => once(
                &mut seen.exec_file,
                "exec-file",
                path("exec-file", value()?)?,
            )?,
            "chroot-base-dir" => once(
                &mut seen.chroot_base,
                "chroot-base-dir",
                path("chroot-base-dir", value()?)?,
            )?,
            "netns" => once(&mut seen.netns, "netns", path("netns", value()?)?)?,
            "uid" => once(&mut seen.uid, "uid", user("uid", &text("uid", value()?)?)?)?,
            "gid" => once(&mut seen.gid, "gid", user("gid", &text("gid", value()?)?)?)?,
            "cgroup" => cgroups.push(cgroup(&text("cgroup", value()?)?)?),
            "cgroup-version" => once(
                &mut seen.cgroup_version,
                "cgroup-version",
                cgroup_version(&text("cgroup-version", value()?)?)?,
            )?,
            "parent-cgroup" => once(
                &mut seen.parent_cgroup,
                "parent-cgroup",
                parent_cgroup(text("parent-cgroup", value()?)?)?,
            )?,
            "resource-limit" => limit(&mut limits, &text("resource-limit", value()?)?)?,
            "pass-fd" => {
                pass_fds.insert(descriptor(&text("pass-fd", value()?)?)?);
            }
            _ => return Err(format!("unknown option --{name}")),
        }
    }
    let missing = |name: &str| format!("--{name} is missing");
    Ok(Request::Run(Box::new(Args {
        id: seen.id.ok_or_else(|| missing("id"))?,
        exec_file: seen.exec_file.ok_or_else(|| missing("exec-file"))?,
        uid: seen.uid.ok_or_else(|| missing("uid"))?,
        gid: seen.gid.ok_or_else(|| missing("gid"))?,
        chroot_base: seen
            .chroot_base
            .unwrap_or_else(|| DEFAULT_CHROOT_BASE.into()),
        netns: seen.netns,
        new_pid_ns,
        daemonize,
        cgroups,
        cgroup_version: seen.cgroup_version.unwrap_or(CgroupVersion::V1),
        parent_cgroup: seen.parent_cgroup,
        limits,
        pass_fds,
        program_args,
    })))
}

fn once<T>(slot: &mut Option<T>, name: &str, value: T) -> Result<(), String> {
    match slot.replace(value) {
        None => Ok(()),
        Some(_) => Err(format!("--{name} is given twice")),
    }
}

fn text(name: &str, value: OsString) -> Result<String, String> {
    value
        .into_string()
        .map_err(|v| format!("--{name} {}: not UTF-8", v.display()))
}

fn path(name: &str, value: OsString) -> Result<PathBuf, String> {
    if value.is_empty() {
        return Err(format!("--{name} \"\": expected a path"));
    }
    Ok(value.into())
}

fn id(value: String) -> Result<String, String> {
    let fits = (1..=MAX_ID_CHARS).contains(&value.chars().count());
    if fits && value.chars().all(|c| c.is_ascii_alphanumeric() || c == '-') {
        return Ok(value);
    }
    Err(format!(
        "--id {value:?}: expected 1 to {MAX_ID_CHARS} letters, digits and hyphens"
    ))
}

/// Digits only: what `parse` takes besides, a plus sign, nobody means.
fn number<T: std::str::FromStr>(value: &str) -> Option<T> {
    let digits = !value.is_empty() && value.bytes().all(|b| b.is_ascii_digit());
    if digits { value.parse().ok() } else { None }
}

fn user(name: &str, value: &str) -> Result<u32, String> {
    match number(value) {
        // System calls take it for "leave as it is": the program would stay root.
        Some(u32::MAX) => Err(format!(
            "--{name} {value}: this number stands for no user or group; the largest is {}",
            u32::MAX - 1
        )),
        Some(number) => Ok(number),
        None => Err(format!(
            "--{name} {value:?}: expected a number from 0 to {}, not a name",
            u32::MAX - 1
        )),
    }
}

fn cgroup_version(value: &str) -> Result<CgroupVersion, String> {
    match value {
        "1" => Ok(CgroupVersion::V1),
        "2" => Ok(CgroupVersion::V2),
        _ => Err(format!("--cgroup-version {value:?}: expected 1 or 2")),
    }
}

fn cgroup(value: &str) -> Result<CgroupSetting, String> {
    let wrong = |why: &str| {
        format!("--cgroup {value:?}: {why}; expected FILE=VALUE, such as cpu.weight=50")
    };
    let (file, setting) = value
        .split_once('=')
        .ok_or_else(|| wrong("there is no ="))?;
    if setting.trim().is_empty() {
        return Err(wrong("the value is empty"));
    }
    let plain = |b: u8| b.is_ascii_alphanumeric() || b"._-".contains(&b);
    if file.len() > MAX_NAME_BYTES || !file.bytes().all(plain) {
        return Err(wrong("this is not the name of a file of a cgroup"));
    }
    match file.split_once('.') {
        Some((controller, rest)) if !controller.is_empty() && !rest.is_empty() => {}
        _ => return Err(wrong("the file's name has no controller before a dot")),
    }
    if file.starts_with("cgroup.") {
        return Err(wrong("files of the cgroup itself belong to the jailer"));
    }
    Ok(CgroupSetting {
        file: file.to_owned(),
        value: setting.to_owned(),
    })
}

fn parent_cgroup(value: String) -> Result<String, String> {
    let wrong = |why: &str| {
        format!(
            "--parent-cgroup {value:?}: {why}; expected a path below the hierarchy's root, such as machines/small"
        )
    };
    if value.starts_with('/') {
        return Err(wrong("it is absolute"));
    }
    for part in value.split('/') {
        if part.is_empty() || part == "." || part == ".." {
            return Err(wrong("a part of it is empty, . or .."));
        }
        if part.len() > MAX_NAME_BYTES || part.contains(char::is_control) {
            return Err(wrong("a part of it is no name of a cgroup"));
        }
    }
    Ok(value)
}

fn limit(limits: &mut Limits, value: &str) -> Result<(), String> {
    let expected = "expected no-file=N or fsize=N";
    let Some((name, most)) = value.split_once('=') else {
        return Err(format!("--resource-limit {value:?}: {expected}"));
    };
    let most: u64 = number(most).ok_or_else(|| {
        format!(
            "--resource-limit {value:?}: expected a number from 0 to {} behind =",
            u64::MAX
        )
    })?;
    match name {
        "no-file" => limits.no_file = most,
        "fsize" => limits.file_size_bytes = Some(most),
        _ => return Err(format!("--resource-limit {value:?}: {expected}")),
    }
    Ok(())
}

fn descriptor(value: &str) -> Result<RawFd, String> {
    match number(value) {
        Some(0..=2) => Err(format!(
            "--pass-fd {value}: the program has 0, 1 and 2 in any case; give a larger one"
        )),
        Some(fd) => Ok(fd),
        None => Err(format!(
            "--pass-fd {value:?}: expected the number of a descriptor, 3 or more"
        )),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const NEEDED: &str = "--id a --exec-file vmm --uid 1 --gid 2";

    fn run(line: &str) -> Result<Args, String> {
        words(&line.split_whitespace().collect::<Vec<_>>())
    }

    fn words(words: &[&str]) -> Result<Args, String> {
        match parse(words.iter().map(OsString::from))? {
            Request::Run(args) => Ok(*args),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn firecrackers_words_are_understood() {
        let a = run("--id 551e7604-e35c --exec-file=/usr/bin/vmm --uid 123 --gid 100 \
             --cgroup cpuset.mems=0 --cgroup cpuset.cpus=0-3,5 --netns /run/netns/n --daemonize \
             --new-pid-ns --chroot-base-dir /jails --parent-cgroup all/small --cgroup-version 2 \
             --resource-limit fsize=250000000 --resource-limit no-file=1024 --pass-fd 7 --pass-fd 3 \
             -- --config-file vm.json --id twice --")
        .unwrap();
        assert_eq!(a.id, "551e7604-e35c");
        assert_eq!((a.uid, a.gid), (123, 100));
        assert_eq!(a.exec_file, PathBuf::from("/usr/bin/vmm"));
        assert_eq!(a.chroot_base, PathBuf::from("/jails"));
        assert_eq!(a.netns, Some("/run/netns/n".into()));
        assert!(a.daemonize && a.new_pid_ns);
        assert_eq!(a.cgroup_version, CgroupVersion::V2);
        assert_eq!(a.parent_cgroup.as_deref(), Some("all/small"));
        assert_eq!(a.cgroups[1].file, "cpuset.cpus");
        assert_eq!(a.cgroups[1].value, "0-3,5");
        assert_eq!(a.cgroups[1].controller(), "cpuset");
        assert_eq!(a.limits.no_file, 1024);
        assert_eq!(a.limits.file_size_bytes, Some(250_000_000));
        assert_eq!(a.pass_fds, BTreeSet::from([3, 7]));
        let behind = ["--config-file", "vm.json", "--id", "twice", "--"];
        assert_eq!(a.program_args, behind.map(OsString::from));
    }

    #[test]
    fn what_is_not_said_is_as_firecracker_has_it() {
        let a = run(NEEDED).unwrap();
        assert_eq!(a.chroot_base, PathBuf::from("/srv/jailer"));
        assert_eq!(a.cgroup_version, CgroupVersion::V1);
        assert_eq!(a.limits.no_file, 2048);
        assert_eq!(a.limits.file_size_bytes, None);
        assert!(!a.daemonize && !a.new_pid_ns && a.netns.is_none());
        assert!(a.cgroups.is_empty() && a.pass_fds.is_empty() && a.program_args.is_empty());
    }

    #[test]
    fn a_value_may_hold_what_divides_others() {
        let line: Vec<_> = NEEDED.split_whitespace().collect();
        let a = words(&[&line[..], &["--cgroup", "io.max=8:0 rbps=1000 wiops=5"]].concat());
        let setting = &a.unwrap().cgroups[0];
        assert_eq!(setting.file, "io.max");
        assert_eq!(setting.value, "8:0 rbps=1000 wiops=5");
    }

    #[test]
    fn what_must_be_said_is_missed_by_name() {
        for name in ["id", "exec-file", "uid", "gid"] {
            let line = NEEDED.replace(&format!("--{name} "), "--netns ");
            let e = run(&line).unwrap_err();
            assert!(e.contains(&format!("--{name} is missing")), "{line}: {e}");
        }
        assert!(run("").unwrap_err().contains("--id is missing"));
    }

    #[test]
    fn numbers_at_their_edges() {
        let with = |more: &str| run(&format!("--id a --exec-file e {more}"));
        let a = with("--uid 0 --gid 4294967294").unwrap();
        assert_eq!((a.uid, a.gid), (0, u32::MAX - 1));
        for (more, want) in [
            (
                "--uid 4294967295 --gid 1",
                "--uid 4294967295: this number stands for no user",
            ),
            ("--uid 1 --gid 4294967295", "--gid 4294967295"),
            (
                "--uid 4294967296 --gid 1",
                "expected a number from 0 to 4294967294",
            ),
            ("--uid -1 --gid 1", "--uid \"-1\""),
            ("--uid +1 --gid 1", "--uid \"+1\""),
            ("--uid 0x1 --gid 1", "--uid \"0x1\""),
            ("--uid root --gid 1", "not a name"),
        ] {
            let e = with(more).unwrap_err();
            assert!(e.contains(want), "{more}: {e}");
        }
        let with = |more: &str| run(&format!("{NEEDED} {more}"));
        let most = u64::MAX.to_string();
        let a = with(&format!(
            "--resource-limit no-file={most} --resource-limit fsize=0"
        ))
        .unwrap();
        assert_eq!(a.limits.no_file, u64::MAX);
        assert_eq!(a.limits.file_size_bytes, Some(0));
        for more in [
            "--resource-limit no-file=18446744073709551616",
            "--resource-limit no-file=-1",
            "--resource-limit no-file=",
            "--resource-limit no-file",
            "--resource-limit =5",
            "--resource-limit nproc=5",
            "--pass-fd 2",
            "--pass-fd 2147483648",
            "--pass-fd -3",
        ] {
            let e = with(more).unwrap_err();
            let said = more.split(['=', ' ']).next().unwrap();
            assert!(
                e.contains(said) && e.contains("expected") || e.contains("larger"),
                "{e}"
            );
        }
    }

    #[test]
    fn wrong_words_are_named() {
        let long = "a".repeat(300);
        for (more, want) in [
            (format!("--id {long}"), "1 to 64 letters"),
            ("--id=".into(), "--id \"\""),
            ("--id ../../etc".into(), "--id \"../../etc\""),
            ("--id a/b".into(), "a/b"),
            ("--id a_b".into(), "a_b"),
            ("--id ä".into(), "ä"),
            ("--id b".into(), "--id is given twice"),
            ("--uid 3".into(), "--uid is given twice"),
            ("--nope".into(), "--nope"),
            ("-x".into(), "-x"),
            ("stray".into(), "behind --"),
            ("--daemonize=1".into(), "daemonize"),
            ("--chroot-base-dir=".into(), "expected a path"),
            ("--cgroup-version 3".into(), "expected 1 or 2"),
            ("--cgroup cpu.weight".into(), "there is no ="),
            ("--cgroup cpu.weight=".into(), "the value is empty"),
            ("--cgroup weight=5".into(), "no controller before a dot"),
            ("--cgroup ../cpu.weight=5".into(), "not the name of a file"),
            (format!("--cgroup cpu.{long}=5"), "not the name of a file"),
            ("--cgroup cgroup.procs=1".into(), "belong to the jailer"),
            ("--parent-cgroup /a".into(), "it is absolute"),
            ("--parent-cgroup a/../b".into(), "empty, . or .."),
            ("--parent-cgroup a//b".into(), "empty, . or .."),
            ("--parent-cgroup=".into(), "empty, . or .."),
            (format!("--parent-cgroup a/{long}"), "no name of a cgroup"),
            (
                "--pass-fd one".into(),
                "expected the number of a descriptor",
            ),
        ] {
            let base = if more.starts_with("--id b") {
                NEEDED
            } else {
                "--exec-file e --uid 1 --gid 2"
            };
            let e = run(&format!("{base} {more}")).unwrap_err();
            assert!(e.contains(want), "{more}: {e}");
        }
    }

    proptest::proptest! {
        #[test]
        fn no_words_bring_it_down(words in proptest::collection::vec("-{0,2}[a-z.=/0-9-]{0,12}", 0..8)) {
            let _ = parse(words.iter().map(OsString::from));
        }
    }
}
