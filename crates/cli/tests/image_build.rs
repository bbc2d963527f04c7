//! `alveole image build` without commands, which need no guest: what is copied, from where, and to where.

#![expect(clippy::unwrap_used, reason = "a test fails where it stands")]

use std::fs;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use tempfile::TempDir;

struct House {
    folder: TempDir,
}

impl House {
    fn new() -> Self {
        let house = Self {
            folder: tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap(),
        };
        fs::create_dir(house.path("context")).unwrap();
        house
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn write(&self, name: &str, content: &str) -> PathBuf {
        let path = self.path("context").join(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(&path, content).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o644)).unwrap();
        path
    }

    fn image(&self, words: &[&str]) -> Output {
        Command::new(env!("CARGO_BIN_EXE_alveole"))
            .args(["image", "--store"])
            .arg(self.path("store"))
            .args(words)
            .current_dir(self.folder.path())
            .env("ALVEOLE_HOME", self.path("home"))
            .env_remove("SOURCE_DATE_EPOCH")
            .stdin(Stdio::null())
            .output()
            .unwrap()
    }

    #[track_caller]
    fn build(&self, recipe: &str, words: &[&str]) -> String {
        self.write("Dockerfile", recipe);
        let output = self.image(&[&["build", "-t", "made", "context"], words].concat());
        assert!(
            output.status.success(),
            "{recipe}: {}",
            String::from_utf8_lossy(&output.stderr)
        );
        self.inspect()["id"].as_str().unwrap().into()
    }

    #[track_caller]
    fn refused(&self, recipe: &str, words: &[&str], said: &str) {
        self.write("Dockerfile", recipe);
        let output = self.image(&[&["build", "-t", "bad", "context"], words].concat());
        let errors = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(
            !output.status.success() && errors.contains(said),
            "{recipe}: {errors}"
        );
        assert!(!self.image(&["inspect", "bad"]).status.success());
    }

    fn inspect(&self) -> serde_json::Value {
        let json: serde_json::Value =
            serde_json::from_slice(&self.image(&["inspect", "made"]).stdout).unwrap();
        json[0].clone()
    }

    /// `tar -tv` of the image's files.
    fn files(&self) -> String {
        let tar = self.path("out.tar");
        let _ = fs::remove_file(&tar);
        let done = self.image(&[
            "export",
            "made",
            "--as",
            "rootfs",
            "-o",
            tar.to_str().unwrap(),
        ]);
        assert!(done.status.success(), "{done:?}");
        let listed = Command::new("tar")
            .args(["--numeric-owner", "--utc", "-tvf"])
            .arg(&tar)
            .output()
            .unwrap();
        String::from_utf8(listed.stdout).unwrap()
    }

    /// An image whose root has users, a link among folders, and folders.
    fn base(&self) {
        let root = self.path("root");
        fs::create_dir_all(root.join("usr/bin")).unwrap();
        fs::create_dir_all(root.join("etc")).unwrap();
        fs::create_dir_all(root.join("tmp")).unwrap();
        fs::set_permissions(root.join("tmp"), fs::Permissions::from_mode(0o1777)).unwrap();
        symlink("usr/bin", root.join("bin")).unwrap();
        fs::write(
            root.join("etc/passwd"),
            "root:x:0:0::/root:/bin/sh\nweb:x:33:44::/:/bin/sh\n",
        )
        .unwrap();
        fs::write(root.join("etc/group"), "root:x:0:\nstaff:x:50:\n").unwrap();
        let done = self.image(&["import", path(&root), "base"]);
        assert!(done.status.success(), "{done:?}");
    }
}

fn path(path: &Path) -> &str {
    path.to_str().unwrap()
}

fn line<'a>(files: &'a str, name: &str) -> &'a str {
    let found = files.lines().find(|line| {
        line.split(" -> ")
            .next()
            .unwrap()
            .ends_with(&format!(" ./{name}"))
            || line
                .split(" -> ")
                .next()
                .unwrap()
                .ends_with(&format!(" {name}"))
    });
    found.unwrap_or_else(|| panic!("no {name} in {files}"))
}

#[test]
fn files_come_where_and_as_the_recipe_says() {
    let house = House::new();
    house.base();
    house.write("one", "1");
    house.write("tool", "#!/bin/sh\n");
    fs::set_permissions(
        house.path("context/tool"),
        fs::Permissions::from_mode(0o755),
    )
    .unwrap();
    house.write("tree/sub/deep", "d");
    house.write("tree/bin/prog", "p");
    house.write("x.txt", "x");
    house.write("y.txt", "y");
    symlink("deep", house.path("context/tree/sub/link")).unwrap();
    symlink("/etc/passwd", house.path("context/tree/absolute")).unwrap();
    symlink("one", house.path("context/also")).unwrap();
    house.build(
        "FROM base\n\
         WORKDIR /srv/app\n\
         COPY one two\n\
         COPY one .\n\
         COPY tool /usr/bin\n\
         COPY tool /bin/second\n\
         COPY --chown=web:staff --chmod=2750 one /owned/deep/\n\
         COPY --chown=web one /by-name\n\
         COPY --chown=7 one /by-number\n\
         COPY tree /\n\
         COPY also /was-link\n\
         COPY *.txt /texts/\n\
         USER web\nWORKDIR ../made\n",
        &[],
    );
    let files = house.files();
    for (name, begin) in [
        ("srv/app/two", "-rw-r--r-- 0/0"),
        ("srv/app/one", "-rw-r--r-- 0/0"),
        ("usr/bin/tool", "-rwxr-xr-x 0/0"),
        ("usr/bin/second", "-rwxr-xr-x 0/0"),
        ("owned/", "drwxr-xr-x 33/50"),
        ("owned/deep/one", "-rwxr-s--- 33/50"),
        ("by-name", "-rw-r--r-- 33/44"),
        ("by-number", "-rw-r--r-- 7/7"),
        ("sub/deep", "-rw-r--r-- 0/0"),
        // The image's link stays, and is followed.
        ("usr/bin/prog", "-rw-r--r-- 0/0"),
        ("bin", "lrwxrwxrwx"),
        ("was-link", "-rw-r--r-- 0/0"),
        ("texts/x.txt", "-rw-r--r-- 0/0"),
        ("texts/y.txt", "-rw-r--r-- 0/0"),
        ("tmp/", "drwxrwxrwt"),
        ("srv/made/", "drwxr-xr-x 33/44"),
    ] {
        assert!(
            line(&files, name).starts_with(begin),
            "{name}: {}",
            line(&files, name)
        );
    }
    assert!(line(&files, "sub/link").ends_with("-> deep"));
    assert!(line(&files, "absolute").ends_with("-> /etc/passwd"));
    assert!(line(&files, "was-link").contains("1980-01-01"));
}

#[test]
fn the_same_files_are_the_same_image_and_are_not_written_again() {
    let house = House::new();
    house.base();
    house.write("a", "content");
    let recipe = "FROM base\nCOPY a /a\nENV X=1\n";
    let first = house.build(recipe, &[]);
    let file = fs::File::options()
        .write(true)
        .open(house.path("context/a"))
        .unwrap();
    file.set_modified(std::time::SystemTime::now()).unwrap();
    let before = fs::read_dir(house.path("store/blobs/sha256"))
        .unwrap()
        .count();
    assert_eq!(house.build(recipe, &["--no-cache"]), first);
    assert_eq!(
        fs::read_dir(house.path("store/blobs/sha256"))
            .unwrap()
            .count(),
        before
    );
    house.write("a", "other");
    assert_ne!(house.build(recipe, &[]), first);
}

#[test]
fn the_image_is_described() {
    let house = House::new();
    house.build(
        "ARG BASE=scratch\nFROM $BASE\nARG GREETING=hello WHO\nENV A=\"$GREETING $WHO\" PATH=/bin\nENV PATH=/usr/bin:$PATH\n\
         LABEL a.b=c d=\"e f\"\nEXPOSE 80 53/udp\nVOLUME /data\nSTOPSIGNAL SIGINT\nUSER 5:6\nCMD [\"x\", \"y\"]\nENTRYPOINT run $A\n",
        &["--build-arg", "WHO=you"],
    );
    let config = house.inspect()["config"].clone();
    let expected = serde_json::json!({
        "User": "5:6", "ExposedPorts": {"53/udp": {}, "80/tcp": {}}, "Env": ["A=hello you", "PATH=/usr/bin:/bin"],
        "Entrypoint": ["/bin/sh", "-c", "run $A"], "Cmd": ["x", "y"], "Volumes": {"/data": {}},
        "Labels": {"a.b": "c", "d": "e f"}, "StopSignal": "SIGINT",
    });
    assert_eq!(config, expected);
    assert_eq!(house.inspect()["created"], "1980-01-01T00:00:01Z");
    // A program brings its own arguments.
    house.build("FROM made\nENTRYPOINT [\"/other\"]\n", &[]);
    assert_eq!(house.inspect()["config"]["Cmd"], serde_json::Value::Null);
}

#[test]
fn nothing_outside_of_the_context_is_copied() {
    let house = House::new();
    house.base();
    fs::write(house.path("secret"), "s").unwrap();
    symlink("../secret", house.path("context/out")).unwrap();
    symlink(house.path("secret"), house.path("context/absolute")).unwrap();
    symlink("..", house.path("context/up")).unwrap();
    for source in [
        "../secret",
        "a/../../secret",
        "out",
        "absolute",
        "up/secret",
        "up",
    ] {
        house.refused(
            &format!("FROM base\nCOPY {source} /x\n"),
            &[],
            "leads out of the context",
        );
    }
    // It begins at the context, as with docker.
    house.write("etc/passwd", "mine");
    house.build("FROM base\nCOPY /etc/passwd /x\n", &[]);
}

#[test]
fn what_is_wrong_is_said_with_its_line() {
    let house = House::new();
    house.base();
    house.write("a", "1");
    house.write("d/f", "1");
    house.write("x/usr", "a file");
    house.write("archive.tar", "");
    let tar = Command::new("tar")
        .args([
            "-C",
            path(&house.path("context")),
            "-cf",
            path(&house.path("context/archive.tar")),
            "a",
        ])
        .status();
    assert!(tar.unwrap().success());
    let pipe = Command::new("mkfifo")
        .arg(house.path("context/d/pipe"))
        .status();
    assert!(pipe.unwrap().success());
    for (recipe, words, said) in [
        (
            "FROM base\nCOPY nothing /x\n",
            &[][..],
            "line 2: cannot copy \"nothing\"",
        ),
        ("FROM base\nCOPY no*thing /x/\n", &[], "fits \"no*thing\""),
        ("FROM base\nCOPY a x /y\n", &[], "with a slash at its end"),
        ("FROM base\nCOPY a a /etc\n", &[], "with a slash at its end"),
        (
            "FROM base\nCOPY a /etc/passwd/\n",
            &[],
            "is no folder in the image",
        ),
        ("FROM base\nCOPY x /\n", &[], "is a folder in the image"),
        (
            "FROM base\nCOPY d /d\n",
            &[],
            "neither a file, a folder nor a link",
        ),
        (
            "FROM base\nCOPY --chown=nobody a /x\n",
            &[],
            "no user \"nobody\"",
        ),
        (
            "FROM base\nCOPY --chown=0:nobody a /x\n",
            &[],
            "no group \"nobody\"",
        ),
        ("FROM base\nCOPY --chmod=9 a /x\n", &[], "octal digits"),
        ("FROM base\nADD archive.tar /x\n", &[], "RUN tar"),
        (
            "FROM base\nWORKDIR /etc/passwd\n",
            &[],
            "is no folder in the image",
        ),
        ("FROM base\nEXPOSE 0\n", &[], "from 1 to 65535"),
        ("FROM base\nSTOPSIGNAL NO\n", &[], "is no signal"),
        (
            "FROM base\nHEALTHCHECK x\n",
            &[],
            "Dockerfile, line 2: HEALTHCHECK is not taken",
        ),
        (
            "FROM base\n",
            &["--build-arg", "A=1"],
            "no ARG of the recipe declares it",
        ),
        ("FROM localhost:1/no\n", &[], "line 1: "),
        ("FROM mmdebstrap:--x\n", &[], "neither a suite"),
    ] {
        house.refused(recipe, words, said);
    }
    let none = house.image(&["build", "d"]);
    assert!(
        String::from_utf8_lossy(&none.stderr)
            .contains("there is no Dockerfile and no Containerfile in d"),
        "{none:?}"
    );
    let none = house.image(&["build", "none"]);
    assert!(!none.status.success());
}

#[test]
fn what_is_ignored_is_left_out() {
    let house = House::new();
    house.write(
        ".dockerignore",
        "# no\n*.log\nbuild\n!build/keep\n**/cache\nsecret\n",
    );
    for name in [
        "a.log",
        "b",
        "build/gone",
        "build/keep",
        "sub/cache/x",
        "sub/c.log",
        "secret",
    ] {
        house.write(name, "x");
    }
    house.build("FROM scratch\nCOPY . /\n", &[]);
    let files = house.files();
    for name in ["b", "build/keep", "sub/c.log"] {
        line(&files, name);
    }
    for gone in ["a.log", "gone", "cache", "secret"] {
        assert!(!files.contains(gone), "{files}");
    }
    fs::write(house.path("context/.dockerignore"), "secret\n").unwrap();
    house.refused(
        "FROM scratch\nCOPY secret /\n",
        &[],
        "left out by .dockerignore",
    );
    fs::write(house.path("context/.dockerignore"), "[\n").unwrap();
    house.refused("FROM scratch\nCOPY b /\n", &[], "line 1 of .dockerignore");
}

#[test]
fn a_large_context_goes_through() {
    let house = House::new();
    for n in 0..3000 {
        house.write(&format!("many/{}/{n}", n % 30), "x");
    }
    let large = fs::File::create(house.path("context/large")).unwrap();
    large.set_len(200 << 20).unwrap();
    let deep: String = (0..60).map(|_| "directory-name/").collect();
    house.write(&format!("{deep}file"), "deep");
    house.build("FROM scratch\nCOPY . /all\n", &[]);
    let files = house.files();
    assert_eq!(
        files
            .lines()
            .filter(|l| l.contains("all/many/") && l.starts_with('-'))
            .count(),
        3000
    );
    assert!(line(&files, "all/large").contains(&(200u64 << 20).to_string()));
    line(&files, &format!("all/{deep}file"));
}

/// A Debian by mmdebstrap, from the archive that this machine's apt knows.
#[test]
fn packages_make_a_base() {
    let test = "packages_make_a_base";
    let archive = Command::new("apt-cache")
        .args(["policy", "base-files"])
        .env("LC_ALL", "C")
        .output();
    let said = archive
        .map(|output| String::from_utf8_lossy(&output.stdout).into_owned())
        .unwrap_or_default();
    let words = said
        .lines()
        .map(|line| line.split_whitespace().collect::<Vec<_>>());
    let mut found = words
        .filter(|words| words.len() > 2 && words[1].contains("://") && words[2].ends_with("/main"));
    let (Some(found), Ok(_)) = (
        found.next(),
        Command::new("mmdebstrap").arg("--version").output(),
    ) else {
        return skip(test, "there is no archive of packages, or no mmdebstrap");
    };
    let (mirror, suite) = (found[1], found[2].trim_end_matches("/main"));
    let updated = Command::new("apt-get")
        .args(["-qq", "-o", "Acquire::Retries=0", "indextargets"])
        .output();
    if !updated.is_ok_and(|output| output.status.success()) {
        return skip(test, "apt does not work here");
    }
    let house = House::new();
    let recipe = format!(
        "FROM --mirror={mirror} --variant=extract mmdebstrap:{suite}\nPACKAGES base-files\nENV A=b\n"
    );
    house.write("Dockerfile", &recipe);
    let output = house.image(&["build", "-t", "made", "context"]);
    let errors = String::from_utf8_lossy(&output.stderr).into_owned();
    if !output.status.success()
        && (errors.contains("Could not") || errors.contains("Failed to fetch"))
    {
        return skip(test, &format!("the archive {mirror} is out of reach"));
    }
    assert!(output.status.success(), "{errors}");
    assert!(line(&house.files(), "usr/lib/os-release").starts_with("-rw-r--r-- 0/0"));
    let first = house.inspect()["id"].clone();
    house.build(&recipe, &[]);
    assert_eq!(house.inspect()["id"], first);
}

/// Says loudly that a test cannot run here, and has it counted.
fn skip(test: &str, why: &str) {
    use std::io::Write;
    let said = format!("SKIPPED {test}: {why}\n");
    let _ = std::io::stderr().write_all(said.as_bytes());
    if let Some(path) = std::env::var_os("ALVEOLE_SKIP_LOG") {
        let log = fs::File::options().create(true).append(true).open(path);
        log.and_then(|mut log| log.write_all(said.as_bytes()))
            .unwrap();
    }
}
