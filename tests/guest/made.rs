//! Images that are made in guests: `alveole image build` with commands, and `alveole commit`.

use std::fs;
use std::os::unix::fs::{PermissionsExt, chown, symlink};
use std::process::Stdio;

use super::images::Home;
use crate::harness::images::{path, tool};
use crate::harness::{is_root, skip};

/// A line for each file: what it is, whose, of which mode, time and content, as the guest sees it. A directory's size and links are its file
/// system's own affair; what is left out are other file systems and what the guest has for itself.
const LIST: &str = "cd /; find . -xdev | sort | grep -vE '^\\./(etc/(hosts|hostname|resolv.conf)|dev|proc|sys|run)?$' | while IFS= read -r f; do \
    if [ -d \"$f\" ] && [ ! -L \"$f\" ]; then stat -c '%n|%F|%a|%u:%g' \"$f\"; \
    else stat -c '%n|%F|%a|%u:%g|%s|%h|%t:%T|%Y' \"$f\"; fi; \
    if [ -L \"$f\" ]; then readlink \"$f\"; elif [ -f \"$f\" ]; then md5sum <\"$f\"; fi; done";

/// Everything that a layer must say: what is gone, replaced, linked, of others, long, special, large.
const CHANGES: &str = "rm /base/gone && rm -r /base/dir && mkdir /base/dir && echo new >/base/dir/new && rm -r /base/whole && \
    rm -r /base/file-now && echo f >/base/file-now && rm /base/dir-now && mkdir -p /base/dir-now/x && \
    echo more >>/base/appended && chmod 4711 /base/mode && chown 70000:80000 /base/owner && chmod 600 /base/attributes && \
    mkdir -m 1777 /new && echo one >/new/one && ln /new/one /new/two && ln /new/one /base/three && ln -s /nowhere/else/ /new/link && \
    mkfifo -m 640 /new/fifo && mknod -m 660 /new/device c 4 70 && mkdir /new/empty && \
    L=$(printf 'l%.0s' $(seq 200)) && mkdir -p /new/$L/$L && echo long >/new/$L/$L/$L && ln -s $L$L /new/$L/to && \
    touch -d '1999-12-31 23:59:59' /new/one && echo odd >\"/new/a b'c\" && \
    dd if=/dev/zero of=/new/sparse bs=1 count=1 seek=134217727 2>/dev/null";

/// The name of an image with the files of a guest's root, and what tests change.
fn base(home: &Home) -> &'static str {
    let base = home.files.join("base");
    for folder in ["dir/sub", "whole/sub", "file-now"] {
        fs::create_dir_all(base.join(folder)).unwrap();
    }
    let files = [
        "gone",
        "dir/old",
        "dir/sub/old",
        "whole/a",
        "whole/sub/b",
        "dir-now",
        "appended",
        "mode",
        "owner",
        "attributes",
        "kept",
    ];
    for file in files {
        fs::write(base.join(file), file).unwrap();
    }
    fs::set_permissions(base.join("kept"), fs::Permissions::from_mode(0o2750)).unwrap();
    chown(base.join("kept"), Some(1), Some(2)).unwrap();
    symlink("base/kept", home.files.join("link")).unwrap();
    assert!(tool(
        "setfattr",
        &[
            "-n",
            "trusted.told",
            "-v",
            "kept through",
            path(&base.join("attributes"))
        ]
    ));
    home.does(&["image", "import", path(&home.files), "base"]);
    "base"
}

#[track_caller]
fn differing(was: &str, is: &str) {
    let (was, is): (Vec<&str>, Vec<&str>) = (was.lines().collect(), is.lines().collect());
    for line in &was {
        assert!(is.contains(line), "gone: {line}");
    }
    for line in &is {
        assert!(was.contains(line), "new: {line}");
    }
    assert!(was == is && was.len() > 50, "{} lines", was.len());
}

#[test]
fn a_committed_image_is_what_the_guest_saw() {
    if !is_root() {
        return skip("only root has files of others, of which an image is made");
    }
    let Some(home) = Home::new() else { return };
    let base = base(&home);
    let id = home.does(&[
        "run", "-d", "--name", "box", "--net", "none", "-e", "SECRET=s", base, "sleep", "1000",
    ]);
    home.does(&["exec", "box", "sh", "-c", CHANGES]);
    let seen = home.does(&["exec", "box", "sh", "-c", LIST]);
    assert!(
        seen.contains("/base/three|regular file|644|0:0|4|3|"),
        "{seen}"
    );
    // While it runs, and writes.
    home.does(&[
        "exec",
        "box",
        "sh",
        "-c",
        "(while :; do echo x >/tmp/busy; done) >/dev/null 2>&1 & echo $! >/run/busy",
    ]);
    let said = home.does(&[
        "commit",
        "-c",
        "CMD [\"cat\", \"/new/one\"]",
        "-c",
        "LABEL made=here",
        "box",
        "running:1",
    ]);
    assert!(
        said.starts_with("running:1: ") && said.contains(" 2 layers of "),
        "{said}"
    );
    assert_eq!(home.does(&["exec", "box", "echo", "goes on"]), "goes on");
    home.does(&[
        "exec",
        "box",
        "sh",
        "-c",
        "kill $(cat /run/busy); sleep 0.5; rm -f /tmp/busy",
    ]);
    let image = |name: &str| -> serde_json::Value {
        let found: serde_json::Value =
            serde_json::from_str(&home.does(&["image", "inspect", name])).unwrap();
        found[0].clone()
    };
    let config = image("running:1")["config"].clone();
    assert_eq!(config["Labels"]["made"], "here");
    assert!(!config.to_string().contains("SECRET"), "{config}");
    assert_eq!(
        home.does(&["run", "--rm", "--net", "none", "running:1"]),
        "one"
    );
    let again = home.does(&[
        "run",
        "--rm",
        "--net",
        "none",
        "running:1",
        "sh",
        "-c",
        &format!("rm -f /tmp/busy; {LIST}"),
    ]);
    differing(&seen, &again);
    // When it does not run any more; how it ended stays known.
    home.does(&["stop", "-t", "1", "box"]);
    let ended = home.does(&["wait", "box"]);
    let said = home.does(&["commit", &id[..6]]);
    assert!(said.starts_with("box:latest: "), "{said}");
    assert_eq!(home.does(&["wait", "box"]), ended);
    assert_eq!(home.does(&["ps", "-q"]), "");
    let again = home.does(&["run", "--rm", "--net", "none", "box", "sh", "-c", LIST]);
    differing(&seen, &again);
    // The hole is one, and the attribute is there.
    let disk = image("box")["root_disk_bytes"].as_u64().unwrap();
    assert!(disk < 32 << 20, "{disk} bytes");
    let archive = home.dir.path().join("out.tar");
    home.does(&[
        "image",
        "export",
        "box",
        "--as",
        "rootfs",
        "-o",
        path(&archive),
    ]);
    let has = |text: &str| {
        let found = std::process::Command::new("grep")
            .args(["-aqF", text, path(&archive)])
            .status();
        found.unwrap().success()
    };
    assert!(has("SCHILY.xattr.trusted.told=kept through"));
    assert!(!has("trusted.overlay") && !has("/.wh."));
    // Without its image, the root disk that it still has is the base.
    for name in [base, "running:1", "box"] {
        home.does(&["image", "rm", name]);
    }
    home.does(&["image", "prune"]);
    let said = home.does(&["commit", "box", "alone"]);
    assert!(said.contains(" 2 layers of "), "{said}");
    let again = home.does(&["run", "--rm", "--net", "none", "alone", "sh", "-c", LIST]);
    differing(&seen, &again);
}

#[test]
fn what_cannot_be_committed_is_said() {
    let Some(home) = Home::new() else { return };
    let root = home.does(&["image", "import", path(&home.files), "base"]);
    assert!(root.starts_with("base:latest: "));
    home.does(&[
        "run",
        "-d",
        "--name",
        "fixed",
        "--read-only",
        "--net",
        "none",
        "base",
        "sleep",
        "1000",
    ]);
    for (words, said) in [
        (&["commit", "none"][..], "none"),
        (&["commit", "fixed"], "--read-only"),
        (
            &["commit", "-c", "RUN x", "fixed"],
            "is no change of an image's description",
        ),
        (&["commit", "fixed", "NO NAME"], "names no image"),
    ] {
        let output = home.output(words);
        let errors = String::from_utf8_lossy(&output.stderr);
        assert!(
            !output.status.success() && errors.contains(said),
            "{words:?}: {errors}"
        );
    }
}

/// A folder with a recipe.
fn recipe(home: &Home, text: &str) -> String {
    let context = home.dir.path().join("context");
    fs::create_dir_all(&context).unwrap();
    fs::write(context.join("Dockerfile"), text).unwrap();
    fs::write(
        context.join("script"),
        "#!/bin/sh\necho \"from the context: $*\"\n",
    )
    .unwrap();
    fs::set_permissions(context.join("script"), fs::Permissions::from_mode(0o755)).unwrap();
    path(&context).to_owned()
}

#[test]
fn commands_of_a_recipe_run_in_guests() {
    let Some(home) = Home::new() else { return };
    home.does(&["image", "import", path(&home.files), "base"]);
    let text = "FROM base\nARG WHO=nobody\nENV A=1 B=\"two words\"\nCOPY script /bin/script\n\
        RUN script $A \"$B\" $WHO >/said; id -u >/who; pwd >/where; hostname >/own && rm /etc/passwd\n\
        USER 33:44\nWORKDIR /work\nRUN [\"/bin/sh\", \"-c\", \"id -u >who; pwd >where; ls /sys/class/net | grep -c eth\"]\n\
        CMD [\"cat\", \"/said\", \"who\", \"where\"]\n";
    // grep finds none, and says so by its status.
    let context = recipe(&home, text);
    let build = |more: &[&str]| {
        let output = home.output(
            &[
                &["image", "build", "--net", "none", "-t", "made"],
                more,
                &[context.as_str()],
            ]
            .concat(),
        );
        (
            output.status.success(),
            String::from_utf8(output.stderr).unwrap(),
        )
    };
    let (done, said) = build(&[]);
    assert!(
        !done && said.contains("Dockerfile, line 8: ") && said.contains("ended with status 1"),
        "{said}"
    );
    assert_eq!(home.does(&["ps", "-aq"]), "");
    let context_again = recipe(
        &home,
        &text.replace("; ls /sys/class/net | grep -c eth", ""),
    );
    assert_eq!(context, context_again);
    let (done, said) = build(&["--build-arg", "WHO=me"]);
    assert!(done && !said.contains("as before"), "{said}");
    assert_eq!(
        home.does(&["run", "--rm", "--net", "none", "made"]),
        "from the context: 1 two words me\n33\n/work"
    );
    let shown = home.does(&[
        "run",
        "--rm",
        "--net",
        "none",
        "-u",
        "0",
        "made",
        "sh",
        "-c",
        "cat /who /where; ls -ld /work /etc/passwd; cat /etc/hosts",
    ]);
    assert!(
        shown.starts_with("0\n/\n")
            && shown.contains(" 33 ")
            && !shown.contains("passwd")
            && !shown.contains("build-"),
        "{shown}"
    );
    let id = |name: &str| {
        let found: serde_json::Value =
            serde_json::from_str(&home.does(&["image", "inspect", name])).unwrap();
        found[0]["id"].as_str().unwrap().to_owned()
    };
    let first = id("made");
    // Again, nothing is done, and it is the same image.
    let (done, said) = build(&["--build-arg", "WHO=me"]);
    assert!(done && said.matches("as before").count() == 2, "{said}");
    assert_eq!(id("made"), first);
    // Other words of the build, or that wish, do it again.
    let (done, said) = build(&["--build-arg", "WHO=you"]);
    assert!(done && !said.contains("as before"), "{said}");
    let (done, said) = build(&["--build-arg", "WHO=me", "--no-cache"]);
    assert!(done && !said.contains("as before"), "{said}");
    // What was kept for the next build goes when it is not needed.
    home.does(&["image", "rm", "made"]);
    let (done, said) = build(&["--build-arg", "WHO=me"]);
    assert!(done && said.matches("as before").count() == 2, "{said}");
    home.does(&["image", "rm", "made"]);
    home.does(&["image", "prune"]);
    let (done, said) = build(&["--build-arg", "WHO=me"]);
    assert!(done && !said.contains("as before"), "{said}");
    assert_eq!(home.does(&["ps", "-aq"]), "");
}

#[test]
fn a_build_that_is_killed_leaves_no_guest() {
    let Some(home) = Home::new() else { return };
    home.does(&["image", "import", path(&home.files), "base"]);
    let context = recipe(&home, "FROM base\nRUN sleep 1000\n");
    let mut build = home
        .command(&["image", "build", "--net", "none", "-t", "made", &context])
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    home.wait_until(60, "guest", || home.does(&["ps"]).contains("running"));
    build.kill().unwrap();
    build.wait().unwrap();
    home.wait_until(60, "end", || home.does(&["ps", "-aq"]).is_empty());
}
