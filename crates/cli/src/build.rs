//! `alveole image build`: an image from a recipe. Commands run in microVMs, each on the image so far.

use std::collections::{BTreeMap, BTreeSet};
use std::io::{self, Read};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use alveole_agent_protocol::Process;
use alveole_image::{
    Act, Base, Context, CopyFiles, Draft, Image, MAX_RECIPE, Progress, Recipe, Reference,
    RunConfig, Step, Store, Word,
};
use anyhow::{Context as _, anyhow, bail};

use crate::guests::{Maker, Wanted, changes};
use crate::image::{How, got, here_or_pulled_into};
use crate::size::MemorySize;
use crate::{hint, print};

/// Recipes that are looked for in a context.
const USUAL_RECIPES: [&str; 2] = ["Dockerfile", "Containerfile"];

#[derive(clap::Args)]
#[command(after_help = "\
A recipe is in a part of the Dockerfile's language: FROM, RUN, COPY, ADD (of files alone), ENV, ARG, WORKDIR, USER, ENTRYPOINT, CMD, LABEL, EXPOSE, VOLUME, STOPSIGNAL; \
all else is refused with its line. There is one stage. `FROM mmdebstrap:SUITE` makes the base of a distribution's packages, which a line `PACKAGES NAME...` below adds to; it \
takes --variant=NAME (minbase) and --mirror=ADDRESS.

Each RUN is a microVM on the image so far; what it changes becomes a layer. A step that was done before, to the same and in the same way, is not done again. \
Copied files are root's and of 1980, or as SOURCE_DATE_EPOCH says, so that the same files give the same image. .dockerignore names what is not copied.")]
pub(crate) struct BuildArgs {
    /// The recipe [Dockerfile or Containerfile in the context]; - is the standard input
    #[arg(short, long, value_name = "FILE")]
    file: Option<PathBuf>,

    /// What the image is called [default: the context's folder]
    #[arg(short, long, value_name = "NAME")]
    tag: Option<Reference>,

    /// What an ARG of the recipe is; without a value as in this process's environment; repeatable
    #[arg(long, value_name = "NAME[=VALUE]")]
    build_arg: Vec<String>,

    /// Do all commands again
    #[arg(long)]
    no_cache: bool,

    /// The network of commands: user, a network's name, tap=IF, macvtap=IF or none [user, where passt is installed]
    #[arg(long, value_name = "WHAT[,OPTION]...")]
    net: Option<String>,

    /// The kernel that commands run with, of `alveole kernel ls` [the default one]
    #[arg(long, value_name = "NAME")]
    kernel: Option<String>,

    /// vCPUs of commands
    #[arg(long, value_name = "N", default_value = "1", value_parser = clap::value_parser!(u8).range(1..))]
    cpus: u8,

    /// Memory of commands
    #[arg(long, value_name = "SIZE", default_value = "512M")]
    memory: MemorySize,

    #[command(flatten)]
    how: How,

    /// The folder that files are copied from
    context: PathBuf,
}

/// A build as it goes on.
struct Build<'a> {
    args: &'a BuildArgs,
    store: &'a Store,
    draft: Draft,
    context: Context,
    name: Reference,
    progress: Box<dyn Progress>,
    /// What `--build-arg` says, and what `ARG`s say behind `FROM`.
    given: BTreeMap<String, String>,
    arguments: BTreeMap<String, String>,
    has_cmd: bool,
}

pub(crate) fn build(store: &Store, args: &BuildArgs) -> anyhow::Result<()> {
    let (shown, text) = recipe(args)?;
    let recipe = Recipe::parse(&text).map_err(|e| anyhow!("{shown}, {e}"))?;
    let given = given(args, &recipe)?;
    let name = match &args.tag {
        Some(name) => name.clone(),
        None => usual_name(&args.context)?,
    };
    let build = Build {
        args,
        store,
        draft: store.draft(args.how.limits(), time()?)?,
        context: Context::open(&args.context)?,
        name,
        progress: args.how.progress(),
        given,
        arguments: BTreeMap::new(),
        has_cmd: false,
    };
    build.all(&recipe, &shown)
}

/// The recipe's name for people, and its text.
fn recipe(args: &BuildArgs) -> anyhow::Result<(String, String)> {
    let mut text = String::new();
    let read = |from: &mut dyn Read, text: &mut String| {
        from.take(MAX_RECIPE as u64 + 1).read_to_string(text)
    };
    let path = match &args.file {
        Some(path) if path.as_os_str() == "-" => {
            read(&mut io::stdin().lock(), &mut text)
                .context("cannot read the recipe from the standard input")?;
            return Ok(("the recipe".into(), text));
        }
        Some(path) => path.clone(),
        None => {
            let usual = USUAL_RECIPES.iter().map(|name| args.context.join(name));
            usual
                .into_iter()
                .find(|path| path.exists())
                .with_context(|| {
                    format!(
                        "there is no {} in {}: write one, or name the recipe by --file",
                        USUAL_RECIPES.join(" and no "),
                        args.context.display()
                    )
                })?
        }
    };
    let shown = path.display().to_string();
    let opened = std::fs::File::open(&path).and_then(|mut file| read(&mut file, &mut text));
    opened.with_context(|| format!("cannot read the recipe {shown}"))?;
    Ok((shown, text))
}

fn usual_name(context: &Path) -> anyhow::Result<Reference> {
    let full = context
        .canonicalize()
        .with_context(|| format!("cannot use {} as the context of a build", context.display()))?;
    let name = full
        .file_name()
        .and_then(|name| name.to_str())
        .unwrap_or_default()
        .to_ascii_lowercase();
    name.parse().map_err(|e| {
        anyhow!(
            "the image has no name, and that of the context cannot be one ({e}): give --tag NAME"
        )
    })
}

/// Of reproducible-builds.org's specification of `SOURCE_DATE_EPOCH`.
fn time() -> anyhow::Result<Option<u64>> {
    match std::env::var("SOURCE_DATE_EPOCH") {
        Ok(text) => Ok(Some(text.parse().with_context(|| {
            format!("SOURCE_DATE_EPOCH={text} is no number of seconds")
        })?)),
        Err(_) => Ok(None),
    }
}

/// What `--build-arg` says. What no `ARG` declares is a mistake.
fn given(args: &BuildArgs, recipe: &Recipe) -> anyhow::Result<BTreeMap<String, String>> {
    let mut declared: BTreeSet<&str> = recipe
        .arguments
        .iter()
        .map(|(name, _)| name.as_str())
        .collect();
    for step in &recipe.steps {
        if let Act::Arg(names) = &step.act {
            declared.extend(names.iter().map(|(name, _)| name.as_str()));
        }
    }
    let mut given = BTreeMap::new();
    for word in &args.build_arg {
        let (name, value) = match word.split_once('=') {
            Some((name, value)) => (name, Some(value.to_owned())),
            None => (word.as_str(), std::env::var(word).ok()),
        };
        if !declared.contains(name) {
            bail!("--build-arg {name}: no ARG of the recipe declares it");
        }
        if let Some(value) = value {
            given.insert(name.to_owned(), value);
        }
    }
    Ok(given)
}

impl Build<'_> {
    fn all(mut self, recipe: &Recipe, shown: &str) -> anyhow::Result<()> {
        let at = |line: usize| move |e: anyhow::Error| anyhow!("{shown}, line {line}: {e:#}");
        self.base(recipe).map_err(at(recipe.base.line))?;
        let count = recipe.steps.len();
        for (number, step) in recipe.steps.iter().enumerate() {
            self.say(&format!("[{}/{count}] {}", number + 1, step.text));
            self.step(step).map_err(at(step.line))?;
        }
        let image = self.draft.finish(&self.name, &*self.progress)?;
        drop(self.progress);
        say_image(&image, &self.name)
    }

    fn say(&self, text: &str) {
        if !self.args.how.is_quiet() {
            hint(text);
        }
    }

    fn base(&mut self, recipe: &Recipe) -> anyhow::Result<()> {
        let mut known: BTreeMap<String, String> = BTreeMap::new();
        for (name, value) in &recipe.arguments {
            let value = self.given.get(name).cloned().or(value
                .as_ref()
                .map(|v| v.expand(&|n| known.get(n).cloned()))
                .transpose()
                .map_err(|e| anyhow!(e))?);
            known.extend(value.map(|value| (name.clone(), value)));
        }
        let lookup = |name: &str| known.get(name).cloned();
        let from = expanded(&recipe.base.from, &lookup)?;
        self.say(&format!("FROM {from}"));
        if from == "scratch" {
            return Ok(());
        }
        match from.strip_prefix("mmdebstrap:") {
            Some(suite) => self.packages(&recipe.base, suite, &lookup)?,
            None => {
                let image = here_or_pulled_into(self.store, &from)?;
                self.draft.over(&image)?;
            }
        }
        // What a base says to run is replaced as a whole.
        self.has_cmd = false;
        Ok(())
    }

    /// A root of a distribution's packages, as `mmdebstrap` writes it to its standard output.
    fn packages(
        &mut self,
        base: &Base,
        suite: &str,
        lookup: &dyn Fn(&str) -> Option<String>,
    ) -> anyhow::Result<()> {
        let (packages, mirrors) = (
            all_expanded(&base.packages, lookup)?,
            all_expanded(&base.mirrors, lookup)?,
        );
        let variant = match &base.variant {
            Some(variant) => expanded(variant, lookup)?,
            None => "minbase".into(),
        };
        let odd = |word: &&String| word.starts_with('-') || word.contains(|c: char| c.is_control());
        if let Some(word) = packages
            .iter()
            .chain(&mirrors)
            .chain([&variant, &suite.to_owned()])
            .find(odd)
        {
            bail!("{word:?} is neither a suite, a package nor a mirror");
        }
        let mut words = vec![format!("--variant={variant}"), "--format=tar".into()];
        if !packages.is_empty() {
            words.push(format!("--include={}", packages.join(",")));
        }
        words.extend(["--".into(), suite.to_owned(), "-".into()]);
        words.extend(mirrors);
        let key = self.draft.key(
            &["mmdebstrap"]
                .into_iter()
                .chain(words.iter().map(String::as_str))
                .collect::<Vec<_>>(),
        );
        if !self.args.no_cache && self.draft.again(&key)? {
            self.say("as before");
            return Ok(());
        }
        let proxies = proxies();
        let mut child = Command::new("mmdebstrap")
            .args(&proxies)
            .args(&words)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .spawn()
            .context("cannot run mmdebstrap, which makes roots of packages: install the package mmdebstrap")?;
        let out = child
            .stdout
            .take()
            .context("cannot read what mmdebstrap writes")?;
        let received = self.draft.receive(out, self.args.how.limits().disk_bytes);
        if received.is_err() {
            let _ = child.kill();
        }
        let status = child.wait().context("cannot wait for mmdebstrap")?;
        let received = received?;
        if !status.success() {
            bail!(
                "mmdebstrap failed ({status}): are the suite {suite:?}, the packages and the mirror right, and is that within reach?"
            );
        }
        self.draft.take(received)?;
        self.draft.remember(&key)?;
        Ok(())
    }

    fn step(&mut self, step: &Step) -> anyhow::Result<()> {
        match &step.act {
            Act::Arg(arguments) => {
                for (name, default) in arguments {
                    let value = match (self.given.get(name), default) {
                        (Some(value), _) => Some(value.clone()),
                        (None, Some(default)) => Some(self.expand(default)?),
                        (None, None) => None,
                    };
                    self.arguments
                        .extend(value.map(|value| (name.clone(), value)));
                }
            }
            Act::Run { command, offline } => self.run(&step.text, command.words(), *offline)?,
            Act::Copy {
                sources,
                to,
                owner,
                mode,
                is_add,
            } => {
                let sources = sources
                    .iter()
                    .map(|word| self.expand(word))
                    .collect::<anyhow::Result<_>>()?;
                let owner = match owner {
                    Some(owner) => self.draft.owner(&self.expand(owner)?)?,
                    None => (0, 0),
                };
                let mode = mode
                    .as_ref()
                    .map(|mode| octal(&self.expand(mode)?))
                    .transpose()?;
                let to = self.place(&self.expand(to)?);
                let what = CopyFiles {
                    sources,
                    to,
                    owner,
                    mode,
                    no_archives: *is_add,
                };
                self.draft.copy(&self.context, &what)?;
            }
            act => {
                let env = self.env();
                describe(&mut self.draft.config, act, &move |name| {
                    env.get(name).cloned()
                })?;
                match act {
                    Act::Cmd(_) => self.has_cmd = true,
                    // Arguments for another program mean nothing to this one.
                    Act::Entrypoint(_) if !self.has_cmd => self.draft.config.cmd.clear(),
                    Act::Workdir(_) => {
                        let folder = self.draft.config.working_dir.clone();
                        let user = self.draft.config.user.clone();
                        let owner = if user.is_empty() {
                            (0, 0)
                        } else {
                            self.draft.owner(&user)?
                        };
                        self.draft.folder(&folder, owner)?;
                    }
                    _ => {}
                }
            }
        }
        Ok(())
    }

    /// Variables that a recipe's words see: the image's, else the build's.
    fn env(&self) -> BTreeMap<String, String> {
        let mut env = self.arguments.clone();
        for word in &self.draft.config.env {
            if let Some((name, value)) = word.split_once('=') {
                env.insert(name.into(), value.into());
            }
        }
        env
    }

    fn expand(&self, word: &Word) -> anyhow::Result<String> {
        let env = self.env();
        expanded(word, &|name| env.get(name).cloned())
    }

    /// A destination that does not begin at the root begins where programs start.
    fn place(&self, to: &str) -> String {
        let folder = &self.draft.config.working_dir;
        match to.starts_with('/') {
            true => to.into(),
            // As a folder, `.` has a slash.
            false if matches!(to, "." | "./") => format!("{folder}/"),
            false => format!("{folder}/{to}"),
        }
    }

    fn run(&mut self, text: &str, words: Vec<String>, offline: bool) -> anyhow::Result<()> {
        let config = &self.draft.config;
        let env: Vec<(String, String)> = self.env().into_iter().collect();
        let process = Process {
            args: words,
            env,
            cwd: config.working_dir.clone(),
            make_cwd: true,
            user: config.user.clone(),
            terminal: None,
            input: false,
            outlives_session: false,
        };
        let told = serde_json::to_string(&process).context("cannot write JSON")?;
        let key = self
            .draft
            .key(&["run", &told, if offline { "offline" } else { "" }]);
        if !self.args.no_cache && self.draft.again(&key)? {
            self.say("as before");
            return Ok(());
        }
        let root_disk = self.draft.root_disk(&*self.progress)?;
        let network = match (&self.args.net, offline) {
            (_, true) => vec!["--net=none".into()],
            (Some(net), _) => vec![format!("--net={net}")],
            (None, _) => Vec::new(),
        };
        let maker = Maker::new(Wanted {
            image: &self.name.familiar(),
            root_disk,
            kernel: self.args.kernel.as_deref(),
            cpus: self.args.cpus,
            memory_mib: self.args.memory.mib(),
            network,
            process: process.clone(),
        })?;
        let done = self.in_vm(&maker, &process, text);
        maker.kill();
        self.draft.take(done?)?;
        self.draft.remember(&key)?;
        Ok(())
    }

    fn in_vm(
        &self,
        maker: &Maker,
        process: &Process,
        text: &str,
    ) -> anyhow::Result<alveole_image::Unchecked> {
        let exit = maker
            .run(process)
            .with_context(|| format!("cannot run {text:?}"))?;
        match exit.status() {
            0 => changes(maker.vm(), &self.draft, false),
            status => bail!("{text:?} ended with status {status}: what it said is above"),
        }
    }
}

/// Has a configuration say what an instruction says that does nothing else.
pub(crate) fn describe(
    config: &mut RunConfig,
    act: &Act,
    lookup: &dyn Fn(&str) -> Option<String>,
) -> anyhow::Result<()> {
    match act {
        Act::Env(pairs) => {
            for (name, value) in pairs {
                let (name, value) = (expanded(name, lookup)?, expanded(value, lookup)?);
                let begin = format!("{name}=");
                let word = format!("{begin}{value}");
                match config
                    .env
                    .iter_mut()
                    .find(|known| known.starts_with(&begin))
                {
                    Some(known) => *known = word,
                    None => config.env.push(word),
                }
            }
        }
        Act::Label(pairs) => {
            for (name, value) in pairs {
                config
                    .labels
                    .insert(expanded(name, lookup)?, expanded(value, lookup)?);
            }
        }
        Act::Workdir(folder) => {
            let folder = expanded(folder, lookup)?;
            let whole = match folder.starts_with('/') {
                true => folder,
                false => format!("{}/{folder}", config.working_dir.trim_end_matches('/')),
            };
            config.working_dir = clean(&whole);
        }
        Act::User(user) => config.user = expanded(user, lookup)?,
        Act::Entrypoint(command) => config.entrypoint = command.words(),
        Act::Cmd(command) => config.cmd = command.words(),
        Act::Expose(ports) => {
            for port in all_expanded(ports, lookup)? {
                add(&mut config.exposed_ports, exposed(&port)?);
            }
        }
        Act::Volume(folders) => {
            for folder in all_expanded(folders, lookup)? {
                add(&mut config.volumes, folder);
            }
        }
        Act::StopSignal(signal) => {
            let signal = expanded(signal, lookup)?;
            crate::guests::signal(&signal).map_err(|e| anyhow!("STOPSIGNAL: {e}"))?;
            config.stop_signal = signal;
        }
        Act::Run { .. } | Act::Copy { .. } | Act::Arg(_) => {}
    }
    Ok(())
}

fn add(words: &mut Vec<String>, word: String) {
    if !words.contains(&word) {
        words.push(word);
        // As a set, by name.
        words.sort_unstable();
    }
}

/// `PORT[-PORT][/PROTOCOL]`, whole.
fn exposed(text: &str) -> anyhow::Result<String> {
    let (ports, protocol) = text.split_once('/').unwrap_or((text, "tcp"));
    let good = ports.split('-').count() <= 2
        && ports
            .split('-')
            .all(|port| port.parse::<u16>().is_ok_and(|n| n > 0));
    let protocol = protocol.to_ascii_lowercase();
    if !good || !matches!(protocol.as_str(), "tcp" | "udp" | "sctp") {
        bail!(
            "EXPOSE {text}: write PORT or PORT-PORT, from 1 to 65535, and then /tcp, /udp or nothing"
        );
    }
    Ok(format!("{ports}/{protocol}"))
}

/// Without `.`, `..` and doubled slashes.
fn clean(path: &str) -> String {
    let mut parts: Vec<&str> = Vec::new();
    for part in path
        .split('/')
        .filter(|part| !part.is_empty() && *part != ".")
    {
        match part {
            ".." => drop(parts.pop()),
            part => parts.push(part),
        }
    }
    format!("/{}", parts.join("/"))
}

fn octal(text: &str) -> anyhow::Result<u16> {
    u16::from_str_radix(text, 8)
        .ok()
        .filter(|mode| *mode <= 0o7777)
        .with_context(|| format!("--chmod={text}: write the mode as octal digits, as 755"))
}

fn all_expanded(
    words: &[Word],
    lookup: &dyn Fn(&str) -> Option<String>,
) -> anyhow::Result<Vec<String>> {
    words.iter().map(|word| expanded(word, lookup)).collect()
}

fn expanded(word: &Word, lookup: &dyn Fn(&str) -> Option<String>) -> anyhow::Result<String> {
    word.expand(lookup).map_err(|e| anyhow!(e))
}

/// This machine's way to its mirrors is mmdebstrap's, too.
fn proxies() -> Vec<String> {
    let said = Command::new("apt-config")
        .arg("dump")
        .stderr(Stdio::null())
        .output();
    let said = said
        .map(|output| String::from_utf8_lossy(&output.stdout).into_owned())
        .unwrap_or_default();
    let is_proxy = |line: &&str| {
        line.starts_with("Acquire::http::Proxy") || line.starts_with("Acquire::https::Proxy")
    };
    said.lines()
        .filter(is_proxy)
        .map(|line| format!("--aptopt={line}"))
        .collect()
}

pub(crate) fn say_image(image: &Image, name: &Reference) -> anyhow::Result<()> {
    print(&got(image, &name.to_string()))
}
