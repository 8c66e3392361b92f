"""Which requests go through a proxy."""

import pytest

from veneer.transport.address import origin_of
from veneer.transport.proxies import ProxyRules

ENVIRONMENT = {
    "HTTPS_PROXY": "http://proxy.example:3128",
    "http_proxy": "plain.example:8080",
    "NO_PROXY": "internal.example, .dev.example,10.0.0.0/8,reg.example:5000,192.168.1.7",
}


@pytest.mark.parametrize(
    ("url", "proxy"),
    [
        ("https://registry.example/", "http://proxy.example:3128"),
        ("http://registry.example/", "http://plain.example:8080"),
        ("https://internal.example/", None),
        ("https://a.internal.example/", None),
        ("https://notinternal.example/", "http://proxy.example:3128"),
        ("https://x.dev.example/", None),
        ("https://10.1.2.3:5000/", None),
        ("https://11.1.2.3:5000/", "http://proxy.example:3128"),
        ("https://192.168.1.7/", None),
        ("https://reg.example:5000/", None),
        ("https://reg.example/", "http://proxy.example:3128"),
        ("http://localhost:5000/", None),
        ("http://127.0.0.1:5000/", None),
        ("https://[::1]:5000/", None),
    ],
)
def test_rules_of_the_environment(url: str, proxy: str | None) -> None:
    assert ProxyRules.from_environment(ENVIRONMENT).proxy_for(origin_of(url)) == proxy


def test_all_proxy_and_star() -> None:
    origin = origin_of("https://registry.example/")
    assert ProxyRules.from_environment({"ALL_PROXY": "http://p"}).proxy_for(origin) == "http://p"
    assert ProxyRules.from_environment({"ALL_PROXY": "http://p", "NO_PROXY": "*"}).proxy_for(origin) is None
    assert ProxyRules.from_environment({}).proxy_for(origin) is None


def test_in_a_cgi_the_variable_in_upper_case_is_a_header_of_the_request() -> None:
    environment = {"REQUEST_METHOD": "GET", "HTTP_PROXY": "http://evil.example", "HTTPS_PROXY": "http://p"}
    rules = ProxyRules.from_environment(environment)
    assert rules.proxy_for(origin_of("http://registry.example/")) is None
    assert rules.proxy_for(origin_of("https://registry.example/")) == "http://p"


def test_proxy_passwords_are_not_shown() -> None:
    rules = ProxyRules.from_environment({"HTTPS_PROXY": "http://u:hunter2@p:1"})
    assert "hunter2" not in repr(rules)
