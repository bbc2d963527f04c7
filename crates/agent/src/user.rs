//! Who a process is: `USER[:GROUP]` as images write it, by the guest's own `/etc/passwd` and `/etc/group`.

use std::fs;
use std::path::Path;

/// Who a process is.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Identity {
    pub(crate) uid: u32,
    pub(crate) gid: u32,
    /// Further groups.
    pub(crate) groups: Vec<u32>,
    /// The user's folder.
    pub(crate) home: String,
}

/// A line of `/etc/passwd`.
struct User<'a> {
    name: &'a str,
    uid: u32,
    gid: u32,
    home: &'a str,
}

fn users(passwd: &str) -> impl Iterator<Item = User<'_>> {
    passwd.lines().filter_map(|line| {
        let mut fields = line.split(':');
        let name = fields.next()?;
        let uid = fields.nth(1)?.parse().ok()?;
        let gid = fields.next()?.parse().ok()?;
        let home = fields.nth(1).unwrap_or("/");
        Some(User {
            name,
            uid,
            gid,
            home,
        })
    })
}

/// Names, numbers and members of `/etc/group`.
fn groups(group: &str) -> impl Iterator<Item = (&str, u32, &str)> {
    group.lines().filter_map(|line| {
        let mut fields = line.split(':');
        let name = fields.next()?;
        let gid = fields.nth(1)?.parse().ok()?;
        Some((name, gid, fields.next().unwrap_or_default()))
    })
}

/// Who `user` is, by these files' texts.
fn resolve_by(user: &str, passwd: &str, group: &str) -> Result<Identity, String> {
    let (name, group_name) = match user.split_once(':') {
        Some((name, group)) => (name, Some(group)),
        None => (user, None),
    };
    let number = name.parse::<u32>().ok();
    let found = if name.is_empty() {
        users(passwd).find(|u| u.uid == 0)
    } else {
        // As with containers, a name wins over the number that it may look like.
        users(passwd)
            .find(|u| u.name == name)
            .or_else(|| users(passwd).find(|u| Some(u.uid) == number))
    };
    let uid = match (&found, number) {
        (Some(user), _) => user.uid,
        (None, Some(number)) => number,
        (None, None) if name.is_empty() => 0,
        (None, None) => {
            return Err(format!(
                "no user '{name}' in the guest's /etc/passwd; give a number, or a user that the image has"
            ));
        }
    };
    let gid = match group_name {
        Some(text) => match groups(group).find(|(name, ..)| *name == text) {
            Some((_, gid, _)) => gid,
            None => text.parse().map_err(|_| {
                format!("no group '{text}' in the guest's /etc/group; give a number, or a group that the image has")
            })?,
        },
        None => found.as_ref().map_or(0, |u| u.gid),
    };
    let further = match (&found, group_name) {
        // Whoever names a group has that one alone.
        (Some(user), None) => groups(group)
            .filter(|(_, _, members)| members.split(',').any(|m| m == user.name))
            .map(|(_, gid, _)| gid)
            .collect(),
        _ => Vec::new(),
    };
    Ok(Identity {
        uid,
        gid,
        groups: further,
        home: found.map_or("/", |u| u.home).to_owned(),
    })
}

/// Who `user` is in the guest.
///
/// # Errors
///
/// A name that the guest does not know.
pub(crate) fn resolve(user: &str) -> Result<Identity, String> {
    let read = |path: &str| {
        let bytes = fs::read(Path::new(path)).unwrap_or_default();
        String::from_utf8_lossy(&bytes).into_owned()
    };
    resolve_by(user, &read("/etc/passwd"), &read("/etc/group"))
}

#[cfg(test)]
mod tests {
    use super::*;

    const PASSWD: &str = "root:x:0:0:root:/root:/bin/sh\nbroken\nweb:x:33:33::/var/www:/bin/false\n7:x:99:98::/seven:\n";
    const GROUP: &str = "root:x:0:\nweb:x:33:\naudio:x:29:other,web\nvideo:x:44:web\n";

    fn ids(user: &str) -> (u32, u32, Vec<u32>, String) {
        let who = resolve_by(user, PASSWD, GROUP).unwrap();
        (who.uid, who.gid, who.groups, who.home)
    }

    #[test]
    fn names_and_numbers_as_containers_have_them() {
        assert_eq!(ids(""), (0, 0, vec![], "/root".into()));
        assert_eq!(ids("web"), (33, 33, vec![29, 44], "/var/www".into()));
        assert_eq!(ids("33"), (33, 33, vec![29, 44], "/var/www".into()));
        assert_eq!(ids("web:audio"), (33, 29, vec![], "/var/www".into()));
        assert_eq!(ids("1000:2000"), (1000, 2000, vec![], "/".into()));
        assert_eq!(ids("1000"), (1000, 0, vec![], "/".into()));
        assert_eq!(ids("7"), (99, 98, vec![], "/seven".into()));
        assert_eq!(ids(":video"), (0, 44, vec![], "/root".into()));
    }

    #[test]
    fn unknown_names_are_said() {
        for user in ["nobody", "web:nothing", "-1", "4294967296"] {
            let text = resolve_by(user, PASSWD, GROUP).unwrap_err();
            assert!(text.contains("give a number"), "{text}");
        }
        assert_eq!(resolve_by("5", "", "").unwrap().gid, 0);
    }
}
