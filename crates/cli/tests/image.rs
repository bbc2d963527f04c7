//! `alveole image` as people start it, with real registries (`docker-registry`) on this host, filled by `skopeo`.

#![expect(clippy::unwrap_used, reason = "a test fails where it stands")]

use std::fs::{self, File};
use std::io::Write;
use std::net::{TcpListener, TcpStream};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use serde_json::Value;
use tempfile::TempDir;

/// `secret`, by bcrypt.
const PASSWORD_LINE: &str = "me:$2b$04$gVvR7cTzpGBerdeb5EhGKeEUW7TCBQtwuTariHqznaR/naTId5EzK\n";

/// Says loudly that a test cannot run here, and has it counted.
fn skip(test: &str, why: &str) {
    let line = format!("SKIPPED {test}: {why}\n");
    let _ = std::io::stderr().write_all(line.as_bytes());
    if let Some(path) = std::env::var_os("ALVEOLE_SKIP_LOG") {
        let log = File::options().create(true).append(true).open(path);
        log.and_then(|mut log| log.write_all(line.as_bytes()))
            .unwrap();
    }
}

fn have(test: &str, programs: &[&str]) -> bool {
    programs.iter().all(|program| {
        let there = Command::new(program).arg("--version").output().is_ok();
        if !there {
            skip(test, &format!("there is no {program}"));
        }
        there
    })
}

struct Said {
    status: i32,
    out: String,
    err: String,
}

/// A folder with a store, and what runs for it.
struct House {
    folder: TempDir,
    registries: Vec<Child>,
}

impl Drop for House {
    fn drop(&mut self) {
        for registry in &mut self.registries {
            let _ = registry.kill();
            let _ = registry.wait();
        }
    }
}

impl House {
    fn new() -> Self {
        Self {
            folder: tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap(),
            registries: Vec::new(),
        }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn command(&self, line: &str) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_alveole"));
        command
            .args(["image", "--store"])
            .arg(self.path("store"))
            .args(line.split(' '))
            .current_dir(self.folder.path())
            .env("HOME", self.path("home"))
            .env_remove("DOCKER_CONFIG")
            .env_remove("XDG_RUNTIME_DIR")
            .stdin(Stdio::null());
        command
    }

    fn image(&self, line: &str) -> Said {
        said(&self.command(line).output().unwrap())
    }

    /// A root with a few files, as tar.
    fn root_tar(&self) -> PathBuf {
        let root = self.path("root");
        fs::create_dir_all(root.join("bin")).unwrap();
        fs::write(root.join("bin/hello"), "#!/bin/sh\necho hello\n").unwrap();
        fs::set_permissions(root.join("bin/hello"), fs::Permissions::from_mode(0o4755)).unwrap();
        let tar = self.path("root.tar");
        run(Command::new("tar")
            .arg("-C")
            .arg(&root)
            .arg("-cf")
            .arg(&tar)
            .arg("."));
        tar
    }

    /// A registry with the image `me/thing:1`; `more` goes into its configuration, below `http` and behind it.
    fn registry(&mut self, http: &str, more: &str, skopeo: &[&str], pushed: &str) -> String {
        let port = TcpListener::bind("127.0.0.1:0")
            .unwrap()
            .local_addr()
            .unwrap()
            .port();
        let config = self.path(&format!("registry-{port}.yml"));
        let storage = self.path("registry");
        let text = format!(
            "version: 0.1\nlog:\n  accesslog:\n    disabled: false\nstorage:\n  filesystem:\n    rootdirectory: {}\nhttp:\n  addr: 127.0.0.1:{port}\n{http}{more}",
            storage.display()
        );
        fs::write(&config, text).unwrap();
        let log = File::create(self.path("registry.log")).unwrap();
        let registry = Command::new("docker-registry")
            .arg("serve")
            .arg(&config)
            .stdout(log.try_clone().unwrap())
            .stderr(log)
            .spawn()
            .unwrap();
        self.registries.push(registry);
        let began = Instant::now();
        while TcpStream::connect(("127.0.0.1", port)).is_err() {
            assert!(
                began.elapsed() < Duration::from_secs(20),
                "the registry does not start: {}",
                fs::read_to_string(self.path("registry.log")).unwrap()
            );
            std::thread::sleep(Duration::from_millis(20));
        }
        let address = format!("127.0.0.1:{port}");
        run(Command::new("skopeo")
            .args([
                "--insecure-policy",
                "copy",
                "--quiet",
                "--dest-tls-verify=false",
            ])
            .args(skopeo)
            .arg(pushed)
            .arg(format!("docker://{address}/me/thing:1")));
        address
    }

    /// An image for registries, as an archive for `skopeo`.
    fn to_push(&self) -> String {
        let tar = self.root_tar();
        assert_eq!(
            self.image(&format!("import {} thing", tar.display()))
                .status,
            0
        );
        let archive = self.path("thing.tar");
        assert_eq!(
            self.image(&format!("export thing --output {}", archive.display()))
                .status,
            0
        );
        assert_eq!(self.image("rm thing").status, 0);
        format!("oci-archive:{}", archive.display())
    }
}

fn run(command: &mut Command) {
    let output = command
        .output()
        .unwrap_or_else(|e| panic!("{command:?}: {e}"));
    assert!(
        output.status.success(),
        "{command:?}: {}",
        String::from_utf8_lossy(&output.stderr)
    );
}

fn said(output: &Output) -> Said {
    let text = |bytes: &[u8]| String::from_utf8(bytes.to_vec()).unwrap();
    Said {
        status: output.status.code().unwrap(),
        out: text(&output.stdout),
        err: text(&output.stderr),
    }
}

fn wait_for(what: &str, done: impl Fn() -> bool) {
    let began = Instant::now();
    while !done() {
        assert!(began.elapsed() < Duration::from_secs(30), "{what}");
        std::thread::sleep(Duration::from_millis(10));
    }
}

#[test]
fn an_image_comes_from_a_file_is_shown_and_goes() {
    let house = House::new();
    let tar = house.root_tar();
    let got = house.image(&format!("import {} hello:1", tar.display()));
    assert_eq!(got.status, 0, "{}", got.err);
    assert!(
        got.out.starts_with("hello:1: ") && got.out.contains("1 layers of ") && got.err.is_empty(),
        "{} {}",
        got.out,
        got.err
    );
    let list = house.image("ls").out;
    assert!(
        list.starts_with("NAME     ID")
            && list.contains("hello:1  ")
            && list.contains("linux/amd64"),
        "{list}"
    );
    let shown: Value = serde_json::from_str(&house.image("inspect hello:1").out).unwrap();
    let disk = PathBuf::from(shown[0]["root_disk"].as_str().unwrap());
    assert!(disk.exists() && fs::read(&disk).unwrap()[1024..1028] == [0xe2, 0xe1, 0xf5, 0xe0]);
    let id = shown[0]["id"]
        .as_str()
        .unwrap()
        .trim_start_matches("sha256:")
        .to_owned();
    assert_eq!(house.image("ls --quiet").out, format!("{}\n", &id[..12]));
    let all: Value = serde_json::from_str(&house.image("ls --format json").out).unwrap();
    assert_eq!(all[0]["id"], shown[0]["id"]);
    assert!(
        house
            .image(&format!("inspect {} --format text", &id[..6]))
            .out
            .contains("names        hello:1\n")
    );
    // By the standard input, the same bytes are the same image.
    let mut child = house
        .command("import - again")
        .stdin(File::open(&tar).unwrap())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    assert!(child.wait().unwrap().success());
    let again: Value = serde_json::from_str(&house.image("inspect again").out).unwrap();
    assert_eq!(again[0]["id"], shown[0]["id"]);
    let removed = house.image("rm hello:1 again");
    assert_eq!(
        removed.out,
        "removed docker.io/library/hello:1\nremoved docker.io/library/again:latest\n"
    );
    assert!(!disk.exists());
    assert!(house.image("prune").out.starts_with("freed "));
}

#[test]
fn errors_say_what_and_why_once() {
    let house = House::new();
    for (line, status, said) in [
        (
            "inspect nothing",
            1,
            "alveole: there is no image nothing: `alveole image ls` shows what is there",
        ),
        ("rm nothing", 1, "there is no image nothing"),
        (
            "import /nonexistent x",
            1,
            "cannot open /nonexistent: No such file or directory (os error 2)",
        ),
        ("import . ", 2, "names no image"),
        ("pull UPPER", 2, "names no image"),
        ("pull localhost:1/x", 1, "from localhost:1: no answer"),
        ("pull x --platform linux", 2, "is no platform"),
        ("export nothing", 1, "there is no image nothing"),
        ("build nowhere", 1, "there is no Dockerfile"),
        ("login http://x -u me --password-stdin", 1, "is no registry"),
    ] {
        let got = house.image(line);
        assert_eq!(got.status, status, "{line}: {}", got.err);
        assert!(got.err.contains(said), "{line}: {}", got.err);
        assert_eq!(
            got.err.matches("No such file").count().max(1),
            1,
            "{line}: {}",
            got.err
        );
    }
    fs::write(house.path("text"), "this is no tar archive").unwrap();
    let got = house.image("import text x");
    assert!(
        got.status == 1 && got.err.contains("text is no image"),
        "{}",
        got.err
    );
    // A limit names its option, and the option helps.
    let tar = house.root_tar();
    let few = house.image(&format!("import {} x --max-entries 2", tar.display()));
    assert!(
        few.status == 1 && few.err.contains("--max-entries raises that"),
        "{}",
        few.err
    );
    assert_eq!(
        house
            .image(&format!("import {} x --max-entries 20", tar.display()))
            .status,
        0
    );
    // Nothing is overwritten.
    fs::write(house.path("there"), "mine").unwrap();
    let got = house.image("export x --output there");
    assert!(
        got.status == 1 && got.err.contains("File exists"),
        "{}",
        got.err
    );
    assert_eq!(fs::read(house.path("there")).unwrap(), b"mine");
}

#[test]
fn a_pull_from_a_real_registry_and_again_after_a_kill() {
    let test = "a_pull_from_a_real_registry_and_again_after_a_kill";
    if !have(test, &["docker-registry", "skopeo"]) {
        return;
    }
    let mut house = House::new();
    fs::create_dir_all(house.path("root")).unwrap();
    // Large enough to be met in the middle.
    let mut noise = vec![0u8; 24 << 20];
    let mut state = 1u64;
    for byte in &mut noise {
        state = state
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1);
        *byte = (state >> 56) as u8;
    }
    fs::write(house.path("root/noise"), &noise).unwrap();
    let archive = house.to_push();
    let address = house.registry("", "", &[], &archive);
    let pull = format!("pull {address}/me/thing:1");
    let mut killed = house
        .command(&pull)
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let partial = house.path("store/partial");
    wait_for("a download begins", || {
        fs::read_dir(&partial).is_ok_and(|mut d| {
            d.any(|e| e.is_ok_and(|e| e.metadata().is_ok_and(|m| m.len() > 100_000)))
        }) || killed_is_over(&house)
    });
    let _ = killed.kill();
    let _ = killed.wait();
    let got = house.image(&pull);
    assert_eq!(got.status, 0, "{}", got.err);
    assert!(got.out.contains("1 layers of"), "{}", got.out);
    assert_eq!(
        fs::read_dir(&partial).unwrap().count()
            + fs::read_dir(house.path("store/tmp")).unwrap().count(),
        0
    );
    let mut tar = Vec::new();
    let exported = house
        .command(&format!("export {address}/me/thing:1 --as rootfs"))
        .output()
        .unwrap();
    tar.extend(exported.stdout);
    assert!(tar.windows(1000).any(|w| w == &noise[5000..6000]));
    // A tag that is not there.
    let got = house.image(&format!("pull {address}/me/thing:2"));
    assert!(
        got.status == 1 && got.err.contains("status 404") && got.err.contains("no such image"),
        "{}",
        got.err
    );
}

fn killed_is_over(house: &House) -> bool {
    fs::read_dir(house.path("store/names")).is_ok_and(|mut names| names.next().is_some())
}

#[test]
fn passwords_are_those_of_docker_and_its_helpers() {
    let test = "passwords_are_those_of_docker_and_its_helpers";
    if !have(test, &["docker-registry", "skopeo"]) {
        return;
    }
    let mut house = House::new();
    fs::write(house.path("passwords"), PASSWORD_LINE).unwrap();
    let archive = house.to_push();
    let auth = format!(
        "auth:\n  htpasswd:\n    realm: test\n    path: {}\n",
        house.path("passwords").display()
    );
    let address = house.registry("", &auth, &["--dest-creds", "me:secret"], &archive);
    let pull = format!("pull {address}/me/thing:1");
    let got = house.image(&pull);
    assert!(
        got.status == 1
            && got
                .err
                .contains(&format!("`alveole image login {address}`")),
        "{}",
        got.err
    );
    let config = |text: String| {
        let folder = house.path("docker");
        fs::create_dir_all(&folder).unwrap();
        fs::write(folder.join("config.json"), text).unwrap();
        let path = format!(
            "{}:{}",
            house.path("helpers").display(),
            std::env::var("PATH").unwrap()
        );
        said(
            &house
                .command(&pull)
                .env("DOCKER_CONFIG", folder)
                .env("PATH", path)
                .output()
                .unwrap(),
        )
    };
    // me:wrong
    let got = config(format!(
        r#"{{"auths":{{"{address}":{{"auth":"bWU6d3Jvbmc="}}}}}}"#
    ));
    assert!(
        got.status == 1 && got.err.contains("status 401") && got.err.contains("logged in"),
        "{}",
        got.err
    );
    // me:secret
    let got = config(format!(
        r#"{{"auths":{{"{address}":{{"auth":"bWU6c2VjcmV0"}}}}}}"#
    ));
    assert_eq!(got.status, 0, "{}", got.err);
    fs::create_dir_all(house.path("helpers")).unwrap();
    let helper = house.path("helpers/docker-credential-test");
    fs::write(&helper, format!("#!/bin/sh\nread server\n[ \"$1 $server\" = \"get {address}\" ] && echo '{{\"ServerURL\":\"\",\"Username\":\"me\",\"Secret\":\"secret\"}}'\n")).unwrap();
    fs::set_permissions(&helper, fs::Permissions::from_mode(0o755)).unwrap();
    house.image("prune --all");
    let got = config(format!(r#"{{"credHelpers":{{"{address}":"test"}}}}"#));
    assert_eq!(got.status, 0, "{}", got.err);
    let got = config(format!(r#"{{"credHelpers":{{"{address}":"missing"}}}}"#));
    assert!(
        got.status == 1 && got.err.contains("docker-credential-missing"),
        "{}",
        got.err
    );
}

#[test]
fn a_login_is_checked_kept_and_forgotten() {
    let test = "a_login_is_checked_kept_and_forgotten";
    if !have(test, &["docker-registry", "skopeo"]) {
        return;
    }
    let mut house = House::new();
    fs::write(house.path("passwords"), PASSWORD_LINE).unwrap();
    let archive = house.to_push();
    let auth = format!(
        "auth:\n  htpasswd:\n    realm: test\n    path: {}\n",
        house.path("passwords").display()
    );
    let address = house.registry("", &auth, &["--dest-creds", "me:secret"], &archive);
    let login = |password: &str, path: Option<&str>| {
        let file = house.path("password");
        fs::write(&file, password).unwrap();
        let mut command = house.command(&format!("login -u me --password-stdin {address}"));
        command.stdin(File::open(file).unwrap());
        if let Some(path) = path {
            command.env("PATH", path);
        }
        said(&command.output().unwrap())
    };
    let kept = house.path("home/.docker/config.json");
    let got = login("wrong\n", None);
    assert!(
        got.status == 1 && got.err.contains("does not take that name and password"),
        "{}",
        got.err
    );
    assert!(!kept.exists());
    let got = login("secret\n", None);
    assert!(
        got.status == 0 && got.out.contains(&kept.display().to_string()) && got.err.is_empty(),
        "{} {}",
        got.out,
        got.err
    );
    assert_eq!(
        fs::metadata(&kept).unwrap().permissions().mode() & 0o7777,
        0o600
    );
    // Others find it there as well.
    run(Command::new("skopeo")
        .args(["inspect", "--tls-verify=false", "--authfile"])
        .arg(&kept)
        .arg(format!("docker://{address}/me/thing:1")));
    let pull = format!("pull {address}/me/thing:1");
    assert_eq!(house.image(&pull).status, 0);
    let out = house.image(&format!("logout {address}"));
    assert!(
        out.status == 0 && out.out.starts_with("logged out of"),
        "{}",
        out.err
    );
    assert!(
        house
            .image(&format!("logout {address}"))
            .out
            .contains("nobody was")
    );
    house.image("prune --all");
    let got = house.image(&pull);
    assert!(
        got.status == 1 && got.err.contains("alveole image login"),
        "{}",
        got.err
    );
    // By a helper, if the file names one.
    let helper = house.path("helpers/docker-credential-test");
    fs::create_dir_all(house.path("helpers")).unwrap();
    let store = house.path("helped");
    let script = format!(
        "#!/bin/sh\ncase $1 in store) cat >{0};; erase) rm {0};; get) [ -e {0} ] && cat {0} || {{ echo credentials not found; exit 1; }};; esac\n",
        store.display()
    );
    fs::write(&helper, script).unwrap();
    fs::set_permissions(&helper, fs::Permissions::from_mode(0o755)).unwrap();
    fs::write(&kept, r#"{"credsStore":"test","other":1}"#).unwrap();
    let path = format!(
        "{}:{}",
        house.path("helpers").display(),
        std::env::var("PATH").unwrap()
    );
    let got = login("secret", Some(&path));
    assert!(
        got.status == 0 && got.out.contains("docker-credential-test"),
        "{}",
        got.err
    );
    let helped: Value = serde_json::from_slice(&fs::read(&store).unwrap()).unwrap();
    assert_eq!(helped["Secret"], "secret");
    assert!(!fs::read_to_string(&kept).unwrap().contains("auths"));
    let out = house
        .command(&format!("logout {address}"))
        .env("PATH", &path)
        .output()
        .unwrap();
    assert!(out.status.success() && !store.exists(), "{out:?}");
    // Without a terminal nothing can be asked for.
    let got = house.image(&format!("login {address}"));
    assert!(
        got.status == 1 && got.err.contains("--password-stdin"),
        "{}",
        got.err
    );
}

#[test]
fn registries_with_certificates_are_checked() {
    let test = "registries_with_certificates_are_checked";
    if !have(test, &["docker-registry", "skopeo", "openssl"]) {
        return;
    }
    let mut house = House::new();
    let (key, certificate) = (house.path("key.pem"), house.path("cert.pem"));
    run(Command::new("openssl")
        .args([
            "req",
            "-x509",
            "-newkey",
            "rsa:2048",
            "-nodes",
            "-days",
            "2",
            "-subj",
            "/CN=test",
            "-addext",
            "subjectAltName=IP:127.0.0.1",
        ])
        .args(["-addext", "basicConstraints=critical,CA:FALSE"])
        .arg("-keyout")
        .arg(&key)
        .arg("-out")
        .arg(&certificate));
    let tls = format!(
        "  tls:\n    certificate: {}\n    key: {}\n",
        certificate.display(),
        key.display()
    );
    let archive = house.to_push();
    let address = house.registry(&tls, "", &[], &archive);
    let pull = |trusted: &Path| {
        said(
            &house
                .command(&format!("pull {address}/me/thing:1"))
                .env("SSL_CERT_FILE", trusted)
                .output()
                .unwrap(),
        )
    };
    let other = house.path("other.pem");
    run(Command::new("openssl")
        .args([
            "req",
            "-x509",
            "-newkey",
            "rsa:2048",
            "-nodes",
            "-days",
            "2",
            "-subj",
            "/CN=other",
            "-keyout",
            "/dev/null",
            "-out",
        ])
        .arg(&other));
    let got = pull(&other);
    assert!(
        got.status == 1 && got.err.contains("no answer") && got.err.contains("SSL_CERT_FILE"),
        "{}",
        got.err
    );
    let got = pull(&certificate);
    assert_eq!(got.status, 0, "{}", got.err);
}

#[test]
fn a_full_disk_keeps_nothing_half_made() {
    // More than fits: of the root disk, and, as holes in it take no room, of the layer alone.
    let noise = (0..12u32 << 20).map(|n| (n.wrapping_mul(2_654_435_761) >> 24) as u8 | 1);
    import_on_full_disk(&noise.collect::<Vec<_>>());
    import_on_full_disk(&vec![0; 24 << 20]);
}

fn import_on_full_disk(content: &[u8]) {
    let test = "a_full_disk_keeps_nothing_half_made";
    let house = House::new();
    fs::create_dir_all(house.path("root")).unwrap();
    fs::write(house.path("root/large"), content).unwrap();
    let tar = house.root_tar();
    let store = house.path("store");
    fs::create_dir_all(&store).unwrap();
    let mounted = Command::new("mount")
        .args(["-t", "tmpfs", "-o", "size=16m", "tmpfs"])
        .arg(&store)
        .output();
    if !mounted.is_ok_and(|o| o.status.success()) {
        return skip(test, "only root can make a small disk");
    }
    let got = house.image(&format!("import {} x", tar.display()));
    let left: Vec<_> = fs::read_dir(store.join("tmp")).unwrap().collect();
    let list = house.image("ls --quiet").out;
    house.image("prune");
    let usage = fs::read_dir(store.join("blobs/sha256")).unwrap().count();
    run(Command::new("umount").arg(&store));
    assert!(
        got.status == 1
            && got.err.contains("No space left on device")
            && got.err.contains("alveole image prune"),
        "{}",
        got.err
    );
    assert!(
        left.is_empty() && list.is_empty() && usage == 0,
        "{left:?} {list} {usage}"
    );
}

#[test]
fn no_rights_are_needed() {
    let test = "no_rights_are_needed";
    if !rustix::process::geteuid().is_root() || !have(test, &["setpriv"]) {
        return skip(test, "only root can become somebody else");
    }
    let house = House::new();
    // Files of others, devices, attributes: as root's tar has them.
    let root = house.path("root");
    fs::create_dir_all(root.join("dev")).unwrap();
    run(Command::new("mknod")
        .arg(root.join("dev/null"))
        .args(["c", "1", "3"]));
    fs::write(root.join("theirs"), "x").unwrap();
    std::os::unix::fs::chown(root.join("theirs"), Some(4711), Some(42)).unwrap();
    let tar = house.root_tar();
    // Where everybody may come.
    let shared = tempfile::tempdir_in("/tmp").unwrap();
    fs::set_permissions(shared.path(), fs::Permissions::from_mode(0o755)).unwrap();
    let program = shared.path().join("alveole");
    fs::copy(env!("CARGO_BIN_EXE_alveole"), &program).unwrap();
    let disk = |owner: u32| {
        let store = shared.path().join(format!("store-{owner}"));
        fs::create_dir(&store).unwrap();
        std::os::unix::fs::chown(&store, Some(owner), Some(owner)).unwrap();
        let id = owner.to_string();
        let output = Command::new("setpriv")
            .args(["--reuid", &id, "--regid", &id, "--clear-groups"])
            .arg(&program)
            .args(["image", "--store"])
            .arg(&store)
            .args(["import", "-", "x"])
            .stdin(File::open(&tar).unwrap())
            .output()
            .unwrap();
        assert!(
            output.status.success(),
            "{}",
            String::from_utf8_lossy(&output.stderr)
        );
        let disk = fs::read_dir(store.join("disks"))
            .unwrap()
            .next()
            .unwrap()
            .unwrap()
            .path();
        fs::read(disk).unwrap()
    };
    assert_eq!(
        disk(0),
        disk(65534),
        "what somebody without rights imports is something else"
    );
}
