//! The runtimes that doctor knows, how each makes one call, and what helps where it does not come through.
//!
//! In arguments `{url}` is the call's URL and `{folder}` one for temporary files.

/// Something that runs agents, or that agents run.
#[derive(Debug)]
pub(super) struct Runtime {
    /// Its programs: of those on PATH the first is tried.
    pub programs: &'static [&'static str],
    /// What makes it print its version, and below it a line for each module that can be imported.
    pub version: &'static [&'static str],
    /// What it needs to make a call without asking anybody.
    pub environment: &'static [(&'static str, &'static str)],
    /// What makes calls in it.
    pub clients: &'static [Client],
}

/// Something that makes a call.
#[derive(Debug)]
pub(super) struct Client {
    /// Empty where it is the runtime itself.
    pub name: &'static str,
    /// Tried only where this module can be imported; empty for what is always there.
    pub module: &'static str,
    pub arguments: &'static [&'static str],
    /// What helps where it goes direct, besides its settings.
    pub direct: &'static str,
    /// What helps where it does not trust the CA, besides its settings.
    pub untrusted: &'static str,
    /// The files that can say otherwise than the variables, with the keys that do.
    pub settings: &'static [Settings],
}

/// A file of settings and its keys. It is in the home (`~/`), in the present folder (`./`), or where it is for everybody.
#[derive(Debug)]
pub(super) struct Settings {
    pub file: &'static str,
    pub keys: &'static [&'static str],
}

/// The exit code of a script that does not get as far as its call.
pub(super) const NOT_CALLED: i32 = 70;
/// The name of Java's source file in the folder.
pub(super) const JAVA_FILE: &str = "Call.java";
pub(super) const JAVA: &str = include_str!("Call.java");

const ONLY_A_NETWORK_RULE: &str = "it does not look at HTTPS_PROXY; only a network rule keeps it from going direct";
const OWN_ROOTS: &str = "it has roots of its own: point it at the file that SSL_CERT_FILE names, or leave the hosts it calls out of `routes`";

/// A client without peculiarities.
const PLAIN: Client =
    Client { name: "", module: "", arguments: &[], direct: ONLY_A_NETWORK_RULE, untrusted: OWN_ROOTS, settings: &[] };

/// A script that tells failing to import from failing to call.
macro_rules! python {
    ($modules:literal, $call:literal) => {
        &[
            "-c",
            concat!(
                "import sys\nURL = sys.argv[1]\ntry:\n    import ",
                $modules,
                "\nexcept BaseException as error:\n    print(error, file=sys.stderr)\n    sys.exit(70)\n",
                $call
            ),
            "{url}",
        ]
    };
}

/// In the order in which they are shown.
pub(super) static RUNTIMES: [Runtime; 11] = [CURL, WGET, GIT, GH, PYTHON, NODE, NPM, DENO, BUN, JAVA_RUNTIME, CHROMIUM];

const CURL: Runtime = Runtime {
    programs: &["curl"],
    version: &["--version"],
    environment: &[],
    clients: &[Client {
        arguments: &["-sS", "-o", "/dev/null", "--max-time", "8", "{url}"],
        settings: &[Settings { file: "~/.curlrc", keys: CURLRC }, Settings { file: "~/.config/curlrc", keys: CURLRC }],
        ..PLAIN
    }],
};
const CURLRC: &[&str] = &["proxy", "x", "noproxy", "cacert", "capath", "preproxy", "socks5"];

const WGET: Runtime = Runtime {
    programs: &["wget"],
    version: &["--version"],
    environment: &[],
    clients: &[Client {
        arguments: &["-q", "-O", "/dev/null", "--tries=1", "--timeout=8", "{url}"],
        untrusted: "wget takes its roots from ~/.wgetrc alone: add `ca_certificate = FILE` there, the file that \
                    SSL_CERT_FILE names; `sidebearer exec` does so by itself",
        settings: &[Settings { file: "~/.wgetrc", keys: WGETRC }, Settings { file: "/etc/wgetrc", keys: WGETRC }],
        ..PLAIN
    }],
};
const WGETRC: &[&str] = &["use_proxy", "https_proxy", "no_proxy", "ca_certificate", "ca_directory"];

const GIT: Runtime = Runtime {
    programs: &["git"],
    version: &["--version"],
    environment: &[("GIT_TERMINAL_PROMPT", "0"), ("GIT_ASKPASS", "true")],
    clients: &[Client {
        arguments: &["ls-remote", "{url}"],
        settings: &[
            Settings { file: "./.git/config", keys: GITCONFIG },
            Settings { file: "~/.gitconfig", keys: GITCONFIG },
            Settings { file: "~/.config/git/config", keys: GITCONFIG },
            Settings { file: "/etc/gitconfig", keys: GITCONFIG },
        ],
        ..PLAIN
    }],
};
const GITCONFIG: &[&str] = &["proxy", "sslcainfo", "sslcapath"];

const GH: Runtime = Runtime {
    programs: &["gh"],
    version: &["--version"],
    // It calls nobody without one. Only our own API sees it.
    environment: &[("GH_ENTERPRISE_TOKEN", "sidebearer-placeholder"), ("GH_NO_UPDATE_NOTIFIER", "1")],
    clients: &[Client { arguments: &["api", "{url}"], ..PLAIN }],
};

const PYTHON: Runtime = Runtime {
    programs: &["python3", "python"],
    version: &["-c", include_str!("inventory.py")],
    environment: &[],
    clients: &[
        Client {
            name: "urllib",
            arguments: python!("urllib.request", "urllib.request.urlopen(URL, timeout=8).read()"),
            ..PLAIN
        },
        Client {
            name: "requests",
            module: "requests",
            arguments: python!("requests", "requests.get(URL, timeout=8)"),
            ..PLAIN
        },
        Client { name: "httpx", module: "httpx", arguments: python!("httpx", "httpx.get(URL, timeout=8)"), ..PLAIN },
        Client {
            name: "aiohttp",
            module: "aiohttp",
            arguments: python!(
                "aiohttp, asyncio",
                "async def call():
    async with aiohttp.ClientSession() as session, session.get(URL) as answer:
        await answer.read()
asyncio.run(call())"
            ),
            direct: "aiohttp looks at HTTPS_PROXY only with `aiohttp.ClientSession(trust_env=True)`; code that does so is fine",
            ..PLAIN
        },
        Client {
            name: "urllib3",
            module: "urllib3",
            arguments: python!("urllib3", "urllib3.PoolManager().request('GET', URL, timeout=8, retries=False)"),
            direct: "urllib3 by itself never looks at HTTPS_PROXY: use `urllib3.ProxyManager(os.environ['HTTPS_PROXY'])`, \
                     or requests",
            ..PLAIN
        },
        Client {
            name: "httplib2",
            module: "httplib2",
            arguments: python!("httplib2", "httplib2.Http(timeout=8).request(URL)"),
            direct: "httplib2, and google-api-python-client on it, go direct without PySocks: `pip install PySocks`",
            ..PLAIN
        },
        Client {
            name: "stripe",
            module: "stripe",
            arguments: python!(
                "stripe",
                "stripe.api_key = 'sk_test_placeholder'
stripe.api_base = URL.rsplit('/', 1)[0]
stripe.max_network_retries = 0
stripe.Balance.retrieve()"
            ),
            untrusted: "stripe pins roots of its own: set `stripe.ca_bundle_path = os.environ['SSL_CERT_FILE']` before the \
                        first call",
            ..PLAIN
        },
        Client {
            name: "grpc",
            module: "grpc",
            arguments: python!(
                "grpc, urllib.parse",
                "host = urllib.parse.urlsplit(URL).hostname + ':443'
channel = grpc.secure_channel(host, grpc.ssl_channel_credentials())
channel.unary_unary('/doctor.Probe/Call')(b'', timeout=8)"
            ),
            untrusted: "gRPC takes its roots from GRPC_DEFAULT_SSL_ROOTS_FILE_PATH: set it to the file that SSL_CERT_FILE names",
            ..PLAIN
        },
        Client {
            name: "pip",
            module: "pip",
            // A package by its URL, so that no index is asked.
            arguments: &[
                "-m",
                "pip",
                "--disable-pip-version-check",
                "--retries=0",
                "--timeout=8",
                "download",
                "-q",
                "--no-deps",
                "-d",
                "{folder}",
                "{url}/doctor-1-py3-none-any.whl",
            ],
            settings: &[
                Settings { file: "~/.config/pip/pip.conf", keys: PIPCONF },
                Settings { file: "~/.pip/pip.conf", keys: PIPCONF },
                Settings { file: "/etc/pip.conf", keys: PIPCONF },
            ],
            ..PLAIN
        },
    ],
};
const PIPCONF: &[&str] = &["proxy", "cert"];

const NODE: Runtime = Runtime {
    programs: &["node", "nodejs"],
    version: &["--version"],
    environment: &[],
    clients: &[
        Client {
            name: "fetch",
            arguments: &[
                "-e",
                "if (!globalThis.fetch) process.exit(70)
fetch(process.argv[1], { signal: AbortSignal.timeout(8000) }).then(answer => answer.text())",
                "{url}",
            ],
            direct: NODE_DIRECT,
            ..PLAIN
        },
        Client {
            name: "https",
            arguments: &["-e", "require('node:https').get(process.argv[1], answer => answer.resume())", "{url}"],
            direct: NODE_DIRECT,
            ..PLAIN
        },
    ],
};
const NODE_DIRECT: &str = "Node before 22.21 (and 24.0 to 24.4) does not look at HTTPS_PROXY by itself: run it by \
                           `sidebearer exec`, or install a later one";

const NPM: Runtime = Runtime {
    programs: &["npm"],
    version: &["--version"],
    environment: &[("npm_config_update_notifier", "false"), ("npm_config_audit", "false")],
    clients: &[Client {
        arguments: &["ping", "--registry={url}", "--fetch-retries=0", "--fetch-timeout=8000"],
        settings: &[Settings { file: "./.npmrc", keys: NPMRC }, Settings { file: "~/.npmrc", keys: NPMRC }],
        ..PLAIN
    }],
};
const NPMRC: &[&str] = &["proxy", "https-proxy", "noproxy", "cafile", "ca"];

const DENO: Runtime = Runtime {
    programs: &["deno"],
    version: &["--version"],
    environment: &[("DENO_NO_UPDATE_CHECK", "1")],
    clients: &[Client { arguments: &["eval", "await (await fetch(Deno.args[0])).text()", "{url}"], ..PLAIN }],
};

const BUN: Runtime = Runtime {
    programs: &["bun"],
    version: &["--version"],
    environment: &[],
    clients: &[Client { arguments: &["-e", "await (await fetch(process.argv.at(-1))).text()", "{url}"], ..PLAIN }],
};

const JAVA_RUNTIME: Runtime = Runtime {
    programs: &["java"],
    version: &["-version"],
    environment: &[],
    clients: &[Client {
        arguments: &["{folder}/Call.java", "{url}"],
        direct: "Java looks at `-Dhttps.proxyHost` and `-Dhttps.proxyPort`, which JAVA_TOOL_OPTIONS brings; a program that \
                 names a proxy itself goes its own way",
        untrusted: "Java trusts the file that `-Djavax.net.ssl.trustStore` names, which JAVA_TOOL_OPTIONS brings; a later \
                    option of the program's own wins over it",
        ..PLAIN
    }],
};

const CHROMIUM: Runtime = Runtime {
    programs: &["chromium", "chromium-browser", "google-chrome", "google-chrome-stable"],
    version: &["--version"],
    environment: &[],
    clients: &[Client {
        arguments: &[
            "--headless=new",
            // It is shown one page, ours; the sandbox does not start for root and in many containers.
            "--no-sandbox",
            "--disable-gpu",
            "--disable-dev-shm-usage",
            "--disable-background-networking",
            "--disable-component-update",
            "--no-first-run",
            "--user-data-dir={folder}/chromium",
            "--timeout=8000",
            "--dump-dom",
            "{url}",
        ],
        direct: "a desktop's own proxy settings win over the variables: start it with `--proxy-server=$HTTPS_PROXY`",
        untrusted: "browsers take no CA from a variable: give this one a HOME of its own, as in `sidebearer exec --nss \
                    DIR/.pki/nssdb -- env HOME=DIR chromium`; for `sidebearer run`, `sidebearer ca --nss DIR/.pki/nssdb`",
        ..PLAIN
    }],
};

impl Runtime {
    /// What people call it.
    pub fn name(&self) -> &'static str {
        self.programs.first().copied().unwrap_or_default()
    }

    /// The runtime of a program, by the name of its file: `python3.11` is Python too.
    pub fn of(file_name: &str) -> Option<&'static Runtime> {
        let plain = |name: &str| name.trim_end_matches(|c: char| c.is_ascii_digit() || c == '.').to_owned();
        let is = |program: &&str| *program == file_name || plain(program) == plain(file_name);
        RUNTIMES.iter().find(|runtime| runtime.programs.iter().any(is))
    }
}
