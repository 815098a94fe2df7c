//! Which runtimes a command would use, found without running it.

use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};

use super::probes::{RUNTIMES, Runtime};

/// As much of a program is looked at.
const READ: u64 = 256 << 10;
/// A script's interpreter can be a script.
const DEPTH: usize = 8;
const SHELLS: [&str; 6] = ["sh", "bash", "dash", "zsh", "ksh", "fish"];
/// Programs that run another with the same environment.
const WRAPPERS: [&str; 9] = ["env", "timeout", "nice", "nohup", "stdbuf", "setsid", "time", "ionice", "xvfb-run"];
/// Programs that run another in a Python environment of their own, by `run`.
const RUNNERS: [&str; 5] = ["uv", "poetry", "pipenv", "pdm", "hatch"];
/// Programs that run what npm has installed.
const NODE_RUNNERS: [&str; 6] = ["npx", "npm", "pnpm", "pnpx", "yarn", "tsx"];

/// Something that can be tried, or a program of which nobody knows how.
#[derive(Debug)]
pub(super) enum Subject {
    /// A runtime, and the words that start it.
    Runtime { runtime: &'static Runtime, start: Vec<OsString> },
    /// A program that cannot be tried from outside.
    Unknown { name: String, why: String },
}

/// Where programs are looked for.
pub(super) struct Search {
    /// The value of PATH.
    pub path: OsString,
    pub here: PathBuf,
}

impl Search {
    /// Every runtime on PATH.
    pub fn all(&self) -> Vec<Subject> {
        let on_path = |runtime: &'static Runtime| {
            let program = runtime.programs.iter().find_map(|program| self.find(OsStr::new(program)))?;
            Some(Subject::Runtime { runtime, start: vec![program.into()] })
        };
        RUNTIMES.iter().filter_map(on_path).collect()
    }

    /// What a command would use.
    pub fn used_by(&self, command: &[OsString]) -> Vec<Subject> {
        let mut found = self.resolve(command, DEPTH);
        let mut seen = Vec::new();
        found.retain(|subject| match subject {
            Subject::Runtime { start, .. } if seen.contains(start) => false,
            Subject::Runtime { start, .. } => {
                seen.push(start.clone());
                true
            }
            Subject::Unknown { .. } => true,
        });
        found
    }

    fn resolve(&self, command: &[OsString], depth: usize) -> Vec<Subject> {
        let Some((program, arguments)) = command.split_first() else { return Vec::new() };
        let name = file_name(program);
        let unknown = |why: &str| vec![Subject::Unknown { name: name.clone(), why: why.to_owned() }];
        let Some(path) = self.find(program) else { return unknown("there is no such program on PATH") };
        if depth == 0 {
            return unknown("its interpreter is a script whose interpreter is a script, and so on");
        }
        if WRAPPERS.contains(&name.as_str()) {
            return self.resolve(wrapped(arguments), depth - 1);
        }
        if RUNNERS.contains(&name.as_str()) && arguments.first().is_some_and(|word| word == "run") {
            return self.through(path, arguments);
        }
        if NODE_RUNNERS.contains(&name.as_str()) {
            return self.named(["node"], &name);
        }
        if SHELLS.contains(&name.as_str()) {
            return self.of_shell(arguments, &name);
        }
        match Runtime::of(&name) {
            Some(runtime) => vec![Subject::Runtime { runtime, start: vec![path.into()] }],
            None => self.of_file(&path, &name, depth),
        }
    }

    /// A program that is no runtime by its name: a script, or a binary.
    fn of_file(&self, path: &Path, name: &str, depth: usize) -> Vec<Subject> {
        let unknown = |why: &str| vec![Subject::Unknown { name: name.to_owned(), why: why.to_owned() }];
        let Some(text) = beginning(path) else { return unknown("it cannot be read") };
        let Some(interpreter) = shebang(&text) else {
            return unknown("a program of its own: it cannot be tried from outside");
        };
        let shell = interpreter.first().is_some_and(|program| SHELLS.contains(&file_name(program).as_str()));
        match (shell, re_executed(&text)) {
            (true, Some(program)) => self.resolve(&[program], depth - 1),
            (true, None) => self.of_script(&text, name),
            (false, _) => self.resolve(&interpreter, depth - 1),
        }
    }

    fn of_shell(&self, arguments: &[OsString], name: &str) -> Vec<Subject> {
        let mut words = arguments.iter();
        while let Some(word) = words.next() {
            let text = word.to_string_lossy();
            match text.strip_prefix('-') {
                Some(options) if options.contains('c') && !options.starts_with('-') => {
                    let script = words.next().map(|script| script.to_string_lossy().into_owned()).unwrap_or_default();
                    return self.of_script(script.as_bytes(), name);
                }
                Some(_) => {}
                None => {
                    let script = beginning(&self.here.join(word)).unwrap_or_default();
                    return self.of_script(&script, &file_name(word));
                }
            }
        }
        self.of_script(b"", name)
    }

    /// A shell script can start anything; what it names is tried.
    fn of_script(&self, script: &[u8], name: &str) -> Vec<Subject> {
        let text = String::from_utf8_lossy(script);
        let code = text.lines().filter(|line| !line.trim_start().starts_with('#'));
        let separates = |c: char| !(c.is_alphanumeric() || "_-./$".contains(c));
        let words: Vec<&str> = code.flat_map(|line| line.split(separates)).collect();
        self.named(words.iter().filter(|word| Runtime::of(&file_name(OsStr::new(word))).is_some()).copied(), name)
    }

    fn named<'a>(&self, words: impl IntoIterator<Item = &'a str>, name: &str) -> Vec<Subject> {
        let found: Vec<_> = words
            .into_iter()
            .filter_map(|word| {
                // `$basedir/node` and the like: the name is all that is known.
                let word = if word.contains('$') { file_name(OsStr::new(word)) } else { word.to_owned() };
                let path = self.find(OsStr::new(&word))?;
                Some(Subject::Runtime {
                    runtime: Runtime::of(&file_name(OsStr::new(&word)))?,
                    start: vec![path.into()],
                })
            })
            .collect();
        match found.is_empty() {
            true => vec![Subject::Unknown {
                name: name.to_owned(),
                why: "a script that names no runtime: it cannot be tried from outside".to_owned(),
            }],
            false => found,
        }
    }

    /// `uv run agent.py`: its Python is known to `uv run` alone.
    fn through(&self, runner: PathBuf, arguments: &[OsString]) -> Vec<Subject> {
        let inner = wrapped(arguments.get(1..).unwrap_or_default()).first().map(|word| file_name(word));
        let runtime = inner.and_then(|name| Runtime::of(&name)).or_else(|| Runtime::of("python3"));
        let Some(runtime) = runtime else { return Vec::new() };
        let program = if runtime.name() == "python3" { "python" } else { runtime.name() };
        let start = vec![runner.into(), "run".into(), program.into()];
        vec![Subject::Runtime { runtime, start }]
    }

    /// A program as a shell finds it.
    fn find(&self, program: &OsStr) -> Option<PathBuf> {
        if Path::new(program).components().count() > 1 {
            let path = self.here.join(program);
            return is_program(&path).then_some(path);
        }
        // `here` first for an empty or relative entry, as in a shell.
        std::env::split_paths(&self.path)
            .map(|folder| self.here.join(folder).join(program))
            .find(|path| is_program(path))
    }
}

/// The command in the arguments of a wrapper: what is no option, no assignment and no number.
fn wrapped(arguments: &[OsString]) -> &[OsString] {
    let skipped = |word: &OsString| {
        let word = word.to_string_lossy();
        let number = word.trim_end_matches(['s', 'm', 'h', 'd']).parse::<f64>().is_ok();
        word.starts_with('-') || word.contains('=') || number
    };
    let begins = arguments.iter().position(|word| !skipped(word)).unwrap_or(arguments.len());
    &arguments[begins..]
}

/// The words of a `#!` line.
fn shebang(text: &[u8]) -> Option<Vec<OsString>> {
    let line = text.strip_prefix(b"#!")?.split(|byte| *byte == b'\n').next()?;
    let words = std::str::from_utf8(line).ok()?.split_whitespace().map(OsString::from);
    Some(words.collect())
}

/// What a script of pip or uv starts in its own place, where a path is too long for `#!`: `'''exec' "/path/python" "$0" "$@"`.
fn re_executed(text: &[u8]) -> Option<OsString> {
    let line = std::str::from_utf8(text.split(|byte| *byte == b'\n').nth(1)?).ok()?;
    let rest = line.strip_prefix("'''exec' ")?;
    let program = match rest.strip_prefix('"') {
        Some(quoted) => quoted.split('"').next()?,
        None => rest.split(' ').next()?,
    };
    Some(program.into())
}

fn file_name(program: &OsStr) -> String {
    Path::new(program).file_name().unwrap_or(program).to_string_lossy().into_owned()
}

fn beginning(path: &Path) -> Option<Vec<u8>> {
    let mut text = Vec::new();
    File::open(path).ok()?.take(READ).read_to_end(&mut text).ok()?;
    Some(text)
}

fn is_program(path: &Path) -> bool {
    use std::os::unix::fs::PermissionsExt;
    path.metadata().is_ok_and(|metadata| metadata.is_file() && metadata.permissions().mode() & 0o111 != 0)
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::PermissionsExt;

    use tempfile::TempDir;

    use super::*;

    /// A folder with programs: `bin` is on PATH.
    fn world(programs: &[(&str, &str)]) -> (TempDir, Search) {
        let folder = tempfile::tempdir().unwrap();
        for (name, text) in programs {
            let path = folder.path().join(name);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(&path, text.replace("HERE", folder.path().to_str().unwrap())).unwrap();
            fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
        }
        let search = Search { path: folder.path().join("bin").into(), here: folder.path().to_owned() };
        (folder, search)
    }

    /// What is found, each as its words below the folder, or as a name with a reason.
    fn found(world: &(TempDir, Search), command: &str) -> Vec<String> {
        let words: Vec<OsString> = command.split('|').map(OsString::from).collect();
        let text = |subject| match subject {
            Subject::Runtime { runtime, start } => {
                let words: Vec<_> = start.iter().map(|word| word.to_string_lossy().into_owned()).collect();
                let start = words.join(" ").replace(&format!("{}/", world.0.path().display()), "");
                format!("{}: {start}", runtime.name())
            }
            Subject::Unknown { name, why } => format!("? {name}: {why}"),
        };
        world.1.used_by(&words).into_iter().map(text).collect()
    }

    const BASE: [(&str, &str); 9] = [
        ("bin/python3", "\x7fELF"),
        ("bin/python", "\x7fELF"),
        ("bin/node", "\x7fELF"),
        ("bin/curl", "\x7fELF"),
        ("bin/env", "\x7fELF"),
        ("bin/sh", "\x7fELF"),
        ("bin/timeout", "\x7fELF"),
        ("bin/npx", "#!/usr/bin/env node"),
        ("venv/bin/python3.12", "\x7fELF"),
    ];

    #[test]
    fn a_scripts_interpreter_is_the_one_that_is_tried() {
        let mut programs = BASE.to_vec();
        programs.extend([
            ("agent.py", "#!/usr/bin/env python3\nimport requests"),
            ("tool.js", "#!/usr/bin/env -S node --no-warnings\n"),
            ("venv/bin/agent", "#!HERE/venv/bin/python3.12\n"),
            ("bin/shim", "#!HERE/agent.py\n"),
            ("bin/loop", "#!HERE/bin/loop\n"),
        ]);
        let world = world(&programs);
        assert_eq!(found(&world, "./agent.py"), ["python3: bin/python3"]);
        assert_eq!(found(&world, "./tool.js"), ["node: bin/node"]);
        assert_eq!(found(&world, "venv/bin/agent|--flag"), ["python3: venv/bin/python3.12"]);
        assert_eq!(found(&world, "venv/bin/python3.12|x.py"), ["python3: venv/bin/python3.12"]);
        assert_eq!(found(&world, "shim"), ["python3: bin/python3"]);
        let endless = "? loop: its interpreter is a script whose interpreter is a script, and so on";
        assert_eq!(found(&world, "loop"), [endless]);
    }

    #[test]
    fn a_script_whose_interpreters_path_is_too_long_starts_it_by_the_shell() {
        let long = "#!/bin/sh\n'''exec' \"HERE/venv/bin/python3.12\" \"$0\" \"$@\"\n' '''\nimport x\n";
        let mut programs = BASE.to_vec();
        programs.push(("venv/bin/long", long));
        assert_eq!(found(&world(&programs), "venv/bin/long"), ["python3: venv/bin/python3.12"]);
    }

    #[test]
    fn wrappers_and_runners_are_seen_through() {
        let mut programs = BASE.to_vec();
        programs.push(("bin/uv", "\x7fELF"));
        let world = world(&programs);
        assert_eq!(found(&world, "env|A=1|python3|x.py"), ["python3: bin/python3"]);
        assert_eq!(found(&world, "timeout|-k|5|10s|node|x.js"), ["node: bin/node"]);
        assert_eq!(found(&world, "npx|some-agent"), ["node: bin/node"]);
        assert_eq!(found(&world, "uv|run|agent.py"), ["python3: bin/uv run python"]);
        assert_eq!(found(&world, "uv|run|node|x.js"), ["node: bin/uv run node"]);
    }

    #[test]
    fn of_a_shell_script_everything_that_it_names_is_tried_once() {
        let mut programs = BASE.to_vec();
        programs.push((
            "run.sh",
            "#!/bin/sh\n# not wget\nset -e\ncurl -f x | python3 -c y\nexec \"$basedir/node\" z; curl q\n",
        ));
        programs.push(("bin/wget", "\x7fELF"));
        let world = world(&programs);
        let all = ["curl: bin/curl", "python3: bin/python3", "node: bin/node"];
        assert_eq!(found(&world, "./run.sh"), all);
        assert_eq!(found(&world, "sh|run.sh"), all);
        assert_eq!(found(&world, "sh|-ec|node x&&curl y"), ["node: bin/node", "curl: bin/curl"]);
        assert_eq!(
            found(&world, "sh|-c|true"),
            ["? sh: a script that names no runtime: it cannot be tried from outside"]
        );
    }

    #[test]
    fn a_program_of_its_own_is_not_guessed_at() {
        let mut programs = BASE.to_vec();
        programs.push(("bin/codex", "\x7fELF..."));
        let world = world(&programs);
        assert_eq!(found(&world, "codex"), ["? codex: a program of its own: it cannot be tried from outside"]);
        assert_eq!(found(&world, "nope"), ["? nope: there is no such program on PATH"]);
    }
}
