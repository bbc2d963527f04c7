//! Recipes of images: a part of the Dockerfile's language, and one instruction of our own (`PACKAGES`, behind `FROM mmdebstrap:SUITE`).
//!
//! All of a recipe is read, and all of it that cannot be done is refused with its line, before anything is begun. Variables are put in
//! later ([`Word::expand`]), as a base image brings some.

use std::fmt;

use thiserror::Error;

use crate::words::{Word, split};

/// Most bytes of a recipe.
pub const MAX_RECIPE: usize = 1 << 20;

/// What a recipe says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Recipe {
    /// `ARG`s before `FROM`, for its words.
    pub arguments: Vec<(String, Option<Word>)>,
    /// What it begins with.
    pub base: Base,
    /// What is done then.
    pub steps: Vec<Step>,
}

/// What a recipe begins with.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Base {
    /// Its line.
    pub line: usize,
    /// An image, `scratch`, or `mmdebstrap:SUITE`.
    pub from: Word,
    /// mmdebstrap's `--variant`.
    pub variant: Option<Word>,
    /// Where packages come from: addresses, or lines of `sources.list`.
    pub mirrors: Vec<Word>,
    /// Packages of the distribution, with the names of `PACKAGES`.
    pub packages: Vec<Word>,
}

/// One instruction.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Step {
    /// Its first line.
    pub line: usize,
    /// As it is written, on one line.
    pub text: String,
    /// What it says.
    pub act: Act,
}

/// A program with its arguments.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Command {
    /// A line for `/bin/sh -c`.
    Shell(String),
    /// Words, as a JSON array.
    Exec(Vec<String>),
}

impl Command {
    /// The words that are run.
    #[must_use]
    pub fn words(&self) -> Vec<String> {
        match self {
            Self::Shell(line) => vec!["/bin/sh".into(), "-c".into(), line.clone()],
            Self::Exec(words) => words.clone(),
        }
    }
}

/// What an instruction says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Act {
    /// Run something; without network if that is said.
    Run {
        /// What.
        command: Command,
        /// `--network=none`
        offline: bool,
    },
    /// Copy from the context.
    Copy {
        /// What, below the context.
        sources: Vec<Word>,
        /// Where to.
        to: Word,
        /// `USER[:GROUP]`; else root's.
        owner: Option<Word>,
        /// Octal; else as in the context.
        mode: Option<Word>,
        /// `ADD`, which unpacks archives with docker.
        is_add: bool,
    },
    /// Variables.
    Env(Vec<(Word, Word)>),
    /// Notes.
    Label(Vec<(Word, Word)>),
    /// Variables of the build alone, with what they are if nobody says.
    Arg(Vec<(String, Option<Word>)>),
    /// Where programs start; it is made.
    Workdir(Word),
    /// Who programs are.
    User(Word),
    /// The image's program.
    Entrypoint(Command),
    /// Its arguments.
    Cmd(Command),
    /// Ports that it serves.
    Expose(Vec<Word>),
    /// Folders whose content is data.
    Volume(Vec<Word>),
    /// The signal that asks it to end.
    StopSignal(Word),
}

/// What is wrong with a recipe.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub struct RecipeError {
    /// Its line.
    pub line: usize,
    /// What, why, and what to do.
    pub why: String,
}

impl fmt::Display for RecipeError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "line {}: {}", self.line, self.why)
    }
}

/// Instructions of Dockerfiles that are not taken, and what to do instead.
const REFUSED: [(&str, &str); 4] = [
    (
        "SHELL",
        "commands are run by /bin/sh; name another shell in the command, RUN [\"/bin/bash\", \"-c\", \"...\"]",
    ),
    ("HEALTHCHECK", "nobody would ask: leave it out"),
    (
        "ONBUILD",
        "write the instruction into the recipe of the image that it is for",
    ),
    (
        "MAINTAINER",
        "write LABEL org.opencontainers.image.authors=\"...\"",
    ),
];

impl Recipe {
    /// Reads a recipe.
    ///
    /// # Errors
    /// The first thing in it that is wrong or not taken.
    pub fn parse(text: &str) -> Result<Self, RecipeError> {
        if text.len() > MAX_RECIPE {
            return Err(at(
                1,
                format!("it has more than {MAX_RECIPE} bytes: is it a recipe?"),
            ));
        }
        let mut arguments = Vec::new();
        let mut base: Option<Base> = None;
        let mut steps = Vec::new();
        for Line { number, text } in lines(text)? {
            let said = |why: String| at(number, why);
            let (keyword, rest) = text.split_once(char::is_whitespace).unwrap_or((&text, ""));
            let (keyword, rest) = (keyword.to_ascii_uppercase(), rest.trim());
            if rest.is_empty() && is_known(&keyword) {
                return Err(said(format!("{keyword} says nothing: {}", usage(&keyword))));
            }
            match (keyword.as_str(), &mut base) {
                ("FROM", None) => base = Some(from(number, rest).map_err(said)?),
                ("FROM", Some(_)) => {
                    return Err(said(
                        "a second FROM: recipes have one stage; build the other image by a recipe of its own, and take from it by FROM"
                            .into(),
                    ));
                }
                ("ARG", None) => arguments.extend(args(rest).map_err(said)?),
                ("PACKAGES", Some(base)) if steps.is_empty() && is_debian(&base.from) => {
                    base.packages.extend(words(rest).map_err(said)?);
                }
                ("PACKAGES", _) => {
                    return Err(said(
                        "PACKAGES stands directly behind FROM mmdebstrap:SUITE; in an image, RUN apt-get install".into(),
                    ));
                }
                (known, None) if is_known(known) => {
                    return Err(said(format!(
                        "{known} before FROM: begin with FROM IMAGE or FROM mmdebstrap:SUITE"
                    )));
                }
                (_, _) => {
                    let act = act(&keyword, rest).map_err(said)?;
                    steps.push(Step {
                        line: number,
                        text: text.clone(),
                        act,
                    });
                }
            }
        }
        let base = base.ok_or_else(|| {
            at(
                1,
                "there is no FROM: begin with FROM IMAGE, FROM scratch or FROM mmdebstrap:SUITE"
                    .into(),
            )
        })?;
        Ok(Self {
            arguments,
            base,
            steps,
        })
    }

    /// One instruction, as `commit --change` has it.
    ///
    /// # Errors
    /// It is none that describes an image.
    pub fn change(text: &str) -> Result<Act, RecipeError> {
        let (keyword, rest) = text
            .trim()
            .split_once(char::is_whitespace)
            .unwrap_or((text, ""));
        let keyword = keyword.to_ascii_uppercase();
        let changes = [
            "ENV",
            "LABEL",
            "WORKDIR",
            "USER",
            "ENTRYPOINT",
            "CMD",
            "EXPOSE",
            "VOLUME",
            "STOPSIGNAL",
        ];
        if !changes.contains(&keyword.as_str()) || rest.trim().is_empty() {
            return Err(at(
                1,
                format!(
                    "{text:?} is no change of an image's description: it is one of {}, with its words",
                    changes.join(", ")
                ),
            ));
        }
        act(&keyword, rest.trim()).map_err(|why| at(1, why))
    }
}

fn at(line: usize, why: String) -> RecipeError {
    RecipeError { line, why }
}

/// An instruction without its continuations.
struct Line {
    number: usize,
    text: String,
}

/// Joins what `\` continues; comments and empty lines are passed over, within an instruction, too.
fn lines(text: &str) -> Result<Vec<Line>, RecipeError> {
    let mut found: Vec<Line> = Vec::new();
    let mut open = false;
    // Lines like comments that mean something stand before all others.
    let mut may_direct = true;
    for (index, line) in text
        .strip_prefix('\u{feff}')
        .unwrap_or(text)
        .lines()
        .enumerate()
    {
        let number = index + 1;
        if let Some(comment) = line.trim_start().strip_prefix('#') {
            let directive = comment.split_once('=').filter(|_| may_direct);
            if let Some((name, value)) = directive
                && name.trim().eq_ignore_ascii_case("escape")
                && value.trim() != "\\"
            {
                return Err(at(
                    number,
                    format!(
                        "the escape character {:?} is not taken: write \\",
                        value.trim()
                    ),
                ));
            }
            continue;
        }
        may_direct = false;
        if line.trim().is_empty() {
            continue;
        }
        let trimmed = line.trim_end();
        let (content, goes_on) = match trimmed.strip_suffix('\\') {
            Some(content) => (content, true),
            None => (trimmed, false),
        };
        match found.last_mut().filter(|_| open) {
            Some(last) => last.text.push_str(content),
            None => found.push(Line {
                number,
                text: content.trim_start().into(),
            }),
        }
        open = goes_on;
    }
    if let Some(last) = found.last().filter(|_| open) {
        return Err(at(
            last.number,
            "it ends with \\, and nothing follows: remove that".into(),
        ));
    }
    Ok(found)
}

fn is_known(keyword: &str) -> bool {
    !usage(keyword).is_empty()
}

fn usage(keyword: &str) -> &'static str {
    match keyword {
        "FROM" => "write FROM IMAGE, FROM scratch or FROM mmdebstrap:SUITE",
        "PACKAGES" => "write PACKAGES NAME...",
        "RUN" => "write RUN COMMAND or RUN [\"PROGRAM\", \"ARGUMENT\"]",
        "COPY" | "ADD" => "write COPY SOURCE... DESTINATION",
        "ENV" => "write ENV NAME=VALUE...",
        "LABEL" => "write LABEL NAME=VALUE...",
        "ARG" => "write ARG NAME[=DEFAULT]...",
        "WORKDIR" => "write WORKDIR FOLDER",
        "USER" => "write USER USER[:GROUP]",
        "ENTRYPOINT" | "CMD" => "write it with a command, or with [\"PROGRAM\", \"ARGUMENT\"]",
        "EXPOSE" => "write EXPOSE PORT[/tcp or /udp]...",
        "VOLUME" => "write VOLUME FOLDER...",
        "STOPSIGNAL" => "write STOPSIGNAL SIGNAL",
        _ => "",
    }
}

/// Whether a base is made of packages.
fn is_debian(from: &Word) -> bool {
    from.as_written().starts_with("mmdebstrap:")
}

fn from(line: usize, rest: &str) -> Result<Base, String> {
    let (flags, rest) = flags(rest)?;
    let found = words(rest)?;
    let from = match &found[..] {
        [from] => from.clone(),
        // A name for a stage, of which there is one.
        [from, word, _name] if word.as_written().eq_ignore_ascii_case("as") => from.clone(),
        _ => return Err(format!("FROM has too many words: {}", usage("FROM"))),
    };
    let mut base = Base {
        line,
        from,
        variant: None,
        mirrors: Vec::new(),
        packages: Vec::new(),
    };
    for (name, value) in flags {
        match name {
            "variant" if is_debian(&base.from) => base.variant = Some(Word::new(value)?),
            "mirror" if is_debian(&base.from) => base.mirrors.push(Word::new(value)?),
            "platform" => return Err("--platform: images are built for this machine, as others' programs do not run here".into()),
            _ => return Err(format!("--{name} is no option of FROM: FROM mmdebstrap:SUITE has --variant=NAME and --mirror=ADDRESS")),
        }
    }
    Ok(base)
}

fn act(keyword: &str, rest: &str) -> Result<Act, String> {
    if let Some((_, instead)) = REFUSED.iter().find(|(name, _)| *name == keyword) {
        return Err(format!("{keyword} is not taken: {instead}"));
    }
    if !is_known(keyword) {
        return Err(format!(
            "{keyword:?} is no instruction: there are FROM, PACKAGES, RUN, COPY, ADD, ENV, ARG, WORKDIR, USER, ENTRYPOINT, CMD, LABEL, EXPOSE, VOLUME \
             and STOPSIGNAL"
        ));
    }
    let one = |rest| match &words(rest)?[..] {
        [word] => Ok(word.clone()),
        _ => Err(format!(
            "it has more than one word: {}, in quotes if there are blanks in it",
            usage(keyword)
        )),
    };
    Ok(match keyword {
        "RUN" => run(rest)?,
        "COPY" | "ADD" => copy(keyword, rest)?,
        "ENV" => Act::Env(pairs(rest)?),
        "LABEL" => Act::Label(pairs(rest)?),
        "ARG" => Act::Arg(args(rest)?),
        "WORKDIR" => Act::Workdir(one(rest)?),
        "USER" => Act::User(one(rest)?),
        "ENTRYPOINT" => Act::Entrypoint(command(rest)),
        "CMD" => Act::Cmd(command(rest)),
        "EXPOSE" => Act::Expose(words(rest)?),
        "VOLUME" => Act::Volume(match json(rest) {
            Some(folders) => folders
                .into_iter()
                .map(Word::plain)
                .collect::<Result<_, _>>()?,
            None => words(rest)?,
        }),
        _ => Act::StopSignal(one(rest)?),
    })
}

fn run(rest: &str) -> Result<Act, String> {
    let (flags, rest) = flags(rest)?;
    let mut offline = false;
    for (name, value) in flags {
        match (name, value) {
            ("network", "none") => offline = true,
            ("network", "default") => offline = false,
            ("network", other) => {
                return Err(format!(
                    "--network={other}: write none or default; `alveole image build --net` chooses the network"
                ));
            }
            ("mount", _) => {
                return Err(
                    "--mount is not taken: COPY what the command needs, and remove it after".into(),
                );
            }
            (other, _) => {
                return Err(format!(
                    "--{other} is no option of RUN that is taken: there is --network=none"
                ));
            }
        }
    }
    here_document(rest)?;
    if rest.is_empty() {
        return Err(format!("RUN says nothing: {}", usage("RUN")));
    }
    Ok(Act::Run {
        command: command(rest),
        offline,
    })
}

/// The shell's own would end with the line here.
fn here_document(rest: &str) -> Result<(), String> {
    let is_one = |word: &str| {
        let word = word.trim_start_matches(|c: char| c.is_ascii_digit());
        let name = word
            .strip_prefix("<<")
            .map(|name| name.strip_prefix('-').unwrap_or(name));
        name.is_some_and(|name| {
            name.starts_with(|c: char| c.is_ascii_alphabetic() || matches!(c, '_' | '"' | '\''))
        })
    };
    match rest.split_whitespace().find(|word| is_one(word)) {
        Some(word) => Err(format!(
            "{word} begins a here-document, which is not taken: continue lines by \\, or COPY a script"
        )),
        None => Ok(()),
    }
}

fn copy(keyword: &str, rest: &str) -> Result<Act, String> {
    let (flags, rest) = flags(rest)?;
    let (mut owner, mut mode) = (None, None);
    for (name, value) in flags {
        match name {
            "chown" => owner = Some(Word::new(value)?),
            "chmod" => mode = Some(Word::new(value)?),
            "from" => {
                return Err(
                    "--from is not taken: recipes have one stage; FROM takes another image".into(),
                );
            }
            _ => {
                return Err(format!(
                    "--{name} is no option of {keyword} that is taken: there are --chown=USER[:GROUP] and --chmod=MODE"
                ));
            }
        }
    }
    here_document(rest)?;
    let mut sources = match json(rest) {
        Some(found) => found
            .into_iter()
            .map(Word::plain)
            .collect::<Result<Vec<_>, _>>()?,
        None => words(rest)?,
    };
    let to = sources.pop().filter(|_| !sources.is_empty());
    let to = to.ok_or_else(|| {
        format!(
            "{keyword} wants a source and a destination: {}",
            usage(keyword)
        )
    })?;
    let is_add = keyword == "ADD";
    let is_far = |word: &&Word| {
        let text = word.as_written();
        ["http://", "https://", "ftp://", "git@", "git://", "ssh://"]
            .iter()
            .any(|scheme| text.starts_with(scheme))
    };
    if let Some(far) = sources.iter().find(is_far) {
        return Err(format!(
            "{} is not in the context, and nothing is downloaded: get it first, or RUN a program that does",
            far.as_written()
        ));
    }
    Ok(Act::Copy {
        sources,
        to,
        owner,
        mode,
        is_add,
    })
}

fn command(rest: &str) -> Command {
    json(rest).map_or_else(|| Command::Shell(rest.into()), Command::Exec)
}

/// A JSON array of texts; anything else is none, as in Dockerfiles.
fn json(text: &str) -> Option<Vec<String>> {
    text.starts_with('[')
        .then(|| serde_json::from_str(text).ok())?
}

fn words(rest: &str) -> Result<Vec<Word>, String> {
    split(rest)?.into_iter().map(Word::new).collect()
}

/// Names and values.
type Flags<'a> = Vec<(&'a str, &'a str)>;

/// `--name=value` before everything else.
fn flags(mut rest: &str) -> Result<(Flags<'_>, &str), String> {
    let mut found = Vec::new();
    while let Some(flag) = rest.strip_prefix("--") {
        let (word, after) = flag.split_once(char::is_whitespace).unwrap_or((flag, ""));
        let (name, value) = word
            .split_once('=')
            .ok_or_else(|| format!("--{word} has no value: write --{word}=VALUE"))?;
        found.push((name, value));
        rest = after.trim_start();
    }
    Ok((found, rest))
}

/// `NAME=VALUE...`, or the old form `NAME VALUE`.
fn pairs(rest: &str) -> Result<Vec<(Word, Word)>, String> {
    let found = split(rest)?;
    if !found.first().is_some_and(|first| first.contains('=')) {
        let (name, value) = rest
            .split_once(char::is_whitespace)
            .ok_or_else(|| format!("{rest} has no value: write {rest}=VALUE"))?;
        return Ok(vec![(Word::new(name)?, Word::new(value.trim())?)]);
    }
    let mut pairs = Vec::new();
    for word in found {
        let (name, value) = word.split_once('=').ok_or_else(|| {
            format!("{word:?} is no NAME=VALUE; put values with blanks into quotes")
        })?;
        if name.is_empty() {
            return Err(format!("{word:?} has no name before ="));
        }
        pairs.push((Word::new(name)?, Word::new(value)?));
    }
    Ok(pairs)
}

fn args(rest: &str) -> Result<Vec<(String, Option<Word>)>, String> {
    let one = |word: &str| {
        let (name, value) = match word.split_once('=') {
            Some((name, value)) => (name, Some(Word::new(value)?)),
            None => (word, None),
        };
        let good = |c: char| c.is_ascii_alphanumeric() || c == '_';
        if name.is_empty()
            || !name.chars().all(good)
            || name.starts_with(|c: char| c.is_ascii_digit())
        {
            return Err(format!(
                "{name:?} is no name of a variable: letters, digits and _"
            ));
        }
        Ok((name.to_owned(), value))
    };
    split(rest)?.into_iter().map(one).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn why(text: &str) -> String {
        Recipe::parse(text).unwrap_err().to_string()
    }

    #[test]
    fn a_recipe_is_read_as_docker_reads_it() {
        let text = "# a comment\nARG VERSION=12\n\nFROM debian:$VERSION AS base\n\
            RUN apt-get update && \\\n    # in between\n\n    apt-get install x\n\
            run --network=none [\"/bin/true\", \"a b\"]\n\
            COPY --chown=web:web --chmod=640 a 'b c' /dir/\nCOPY [\"x y\", \"/z\"]\n\
            ENV A=1 B=\"two words\" C=$A\\ b\nENV OLD style with $A\nLABEL k=v\nARG D E=f\n\
            CMD echo $A\nENTRYPOINT [\"/e\"]\nEXPOSE 80 53/udp\nVOLUME [\"/d\"]\nUSER web\nWORKDIR /w\nSTOPSIGNAL INT\n";
        let recipe = Recipe::parse(text).unwrap();
        let a = |name: &str| (name == "A").then(|| "one".to_owned());
        let said = |word: &Word| word.expand(&a).unwrap();
        assert_eq!(recipe.arguments[0].0, "VERSION");
        assert_eq!(
            recipe.base.from.expand(&|_| Some("12".into())).unwrap(),
            "debian:12"
        );
        let lines: Vec<usize> = recipe.steps.iter().map(|step| step.line).collect();
        assert_eq!(lines[..4], [5, 9, 10, 11]);
        let Act::Run {
            command,
            offline: false,
        } = &recipe.steps[0].act
        else {
            panic!()
        };
        assert_eq!(
            command.words()[2],
            "apt-get update &&     apt-get install x"
        );
        assert_eq!(
            recipe.steps[1].act,
            Act::Run {
                command: Command::Exec(vec!["/bin/true".into(), "a b".into()]),
                offline: true
            }
        );
        let Act::Copy {
            sources,
            to,
            owner,
            mode,
            ..
        } = &recipe.steps[2].act
        else {
            panic!()
        };
        let sources: Vec<String> = sources.iter().map(said).collect();
        assert_eq!(sources, ["a", "b c"]);
        assert_eq!(
            (
                said(to),
                said(owner.as_ref().unwrap()),
                said(mode.as_ref().unwrap())
            ),
            ("/dir/".into(), "web:web".into(), "640".into())
        );
        let Act::Copy { sources, .. } = &recipe.steps[3].act else {
            panic!()
        };
        assert_eq!(said(&sources[0]), "x y");
        let Act::Env(pairs) = &recipe.steps[4].act else {
            panic!()
        };
        let values: Vec<String> = pairs.iter().map(|(_, value)| said(value)).collect();
        assert_eq!(values, ["1", "two words", "one b"]);
        let Act::Env(pairs) = &recipe.steps[5].act else {
            panic!()
        };
        assert_eq!(said(&pairs[0].1), "style with one");
    }

    #[test]
    fn variables_are_put_in() {
        let known = |name: &str| match name {
            "A" => Some("x".to_owned()),
            "EMPTY" => Some(String::new()),
            _ => None,
        };
        for (text, expected) in [
            ("$A", "x"),
            ("${A}b", "xb"),
            ("'$A'", "$A"),
            ("\"$A\"", "x"),
            ("\\$A", "$A"),
            ("$B", ""),
            ("$", "$"),
            ("a$", "a$"),
            ("${B:-d}", "d"),
            ("${EMPTY:-d}", "d"),
            ("${EMPTY-d}", ""),
            ("${A:+set}", "set"),
            ("${B:+set}", ""),
            ("${B:-${A}}", "x"),
            ("\"a\\n\"", "a\\n"),
        ] {
            assert_eq!(
                Word::new(text).unwrap().expand(&known).unwrap(),
                expected,
                "{text}"
            );
        }
        for bad in ["${", "${}", "${A", "${A:?x}", "${A#x}", "'a", "\"a"] {
            assert!(Word::new(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn what_is_not_taken_is_said_with_its_line() {
        for (text, line, said) in [
            ("", 1, "no FROM"),
            ("# escape=`\nFROM x", 1, "escape"),
            ("RUN x", 1, "before FROM"),
            ("FROM x\nFROM y", 2, "one stage"),
            ("FROM x\n\nSHELL [\"a\"]", 3, "SHELL is not taken"),
            ("FROM x\nHEALTHCHECK NONE", 2, "HEALTHCHECK"),
            ("FROM x\nONBUILD RUN y", 2, "ONBUILD"),
            ("FROM x\nMAINTAINER me", 2, "LABEL"),
            ("FROM x\nNOTHING y", 2, "is no instruction"),
            ("FROM x\nRUN", 2, "write RUN"),
            ("FROM x\nRUN --mount=type=cache y", 2, "--mount"),
            ("FROM x\nRUN --network=host y", 2, "none or default"),
            ("FROM x\nRUN --security=insecure y", 2, "--security"),
            ("FROM x\nRUN --network=none", 2, "write RUN"),
            ("FROM x\nRUN cat <<EOF", 2, "here-document"),
            ("FROM x\nCOPY <<-'E' /x", 2, "here-document"),
            ("FROM x\nCOPY a", 2, "destination"),
            ("FROM x\nCOPY --from=y a b", 2, "--from"),
            ("FROM x\nCOPY --link=true a b", 2, "--link"),
            ("FROM x\nCOPY --parents a b", 2, "has no value"),
            ("FROM x\nADD https://a/b /c", 2, "nothing is downloaded"),
            ("FROM x\nENV A", 2, "A=VALUE"),
            ("FROM x\nENV A=1 B", 2, "no NAME=VALUE"),
            ("FROM x\nENV =1", 2, "no name"),
            ("FROM x\nENV A='b", 2, "does not end"),
            ("FROM x\nARG 1a", 2, "name of a variable"),
            ("FROM x\nWORKDIR a b", 2, "more than one word"),
            ("FROM x\nUSER", 2, "write USER"),
            ("FROM x\nSTOPSIGNAL a b", 2, "more than one word"),
            ("FROM x y", 1, "too many words"),
            ("FROM --platform=linux/arm64 x", 1, "--platform"),
            ("FROM --variant=x y", 1, "no option of FROM"),
            ("FROM x\nPACKAGES y", 2, "behind FROM mmdebstrap"),
            (
                "FROM mmdebstrap:sid\nRUN a\nPACKAGES y",
                3,
                "behind FROM mmdebstrap",
            ),
            ("FROM x\nRUN a \\\n", 2, "nothing follows"),
            ("FROM x\nWORKDIR ${A!}", 2, "is no variable"),
        ] {
            let said_really = why(text);
            assert!(
                said_really.starts_with(&format!("line {line}: ")) && said_really.contains(said),
                "{text:?}: {said_really}"
            );
        }
        // Shifts and the like are no here-documents.
        Recipe::parse("FROM x\nRUN echo $((1 << 2)) <<<a").unwrap();
    }

    #[test]
    fn packages_are_gathered() {
        let recipe = Recipe::parse("FROM --mirror=http://m/d --variant=apt mmdebstrap:bookworm\nPACKAGES a b\nPACKAGES c\n").unwrap();
        let names: Vec<&str> = recipe.base.packages.iter().map(Word::as_written).collect();
        assert_eq!(names, ["a", "b", "c"]);
        assert_eq!(recipe.base.mirrors[0].as_written(), "http://m/d");
        assert!(recipe.steps.is_empty());
    }

    #[test]
    fn changes_describe_images_alone() {
        assert!(matches!(
            Recipe::change("CMD [\"a\"]"),
            Ok(Act::Cmd(Command::Exec(_)))
        ));
        for bad in ["RUN x", "CMD", "", "COPY a b"] {
            assert!(
                Recipe::change(bad).unwrap_err().why.contains("no change"),
                "{bad}"
            );
        }
    }

    proptest::proptest! {
        #[test]
        fn no_text_is_a_panic(text in "(FROM x\n)?[A-Z]{0,4}[ -~\n\\\\$\"'{}]{0,60}") {
            let _ = Recipe::parse(&text);
            let _ = Recipe::parse(&format!("FROM x\nENV A={text}"));
        }
    }
}
